"""Episodes as an H.264 video with the value curve drawn under the cameras (PyAV; plays in every browser)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

VIEW, PANEL, HEAD, MARGIN = 320, 120, 30, 10
_INK, _SOFT, _LINE, _PAPER = (28, 39, 51), (93, 107, 122), (227, 232, 238), (255, 255, 255)
_GOOD, _BAD, _HUMAN = (18, 117, 111), (184, 67, 47), (217, 154, 43)


@dataclass(frozen=True)
class Clip:
    """One episode to show. images: camera -> uint8 [T, H, W, 3]; values [T] in [-1, 0], NaN where not known."""

    title: str
    images: Mapping[str, NDArray[np.uint8]]
    values: NDArray[np.floating]
    success: bool | None = None
    intervention: NDArray[np.bool_] | None = None


def write_video(path: Path, clips: Iterable[Clip], *, fps: float, hold_s: float = 0.6) -> int:
    """Write the clips one after the other (each end held for `hold_s`) and return the number of frames written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    count = encode_h264(temporary, _pictures(clips, fps, hold_s), fps)
    if count == 0:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path}: expected at least one frame to write, got none")
    temporary.replace(path)
    return count


def encode_h264(path: Path, pictures: Iterable[NDArray[np.uint8]], fps: float) -> int:
    """Write pictures uint8 [H, W, 3] (even sizes, all as the first) as H.264 in MP4; returns how many there were."""
    count = 0
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast"}
        for picture in pictures:
            if count == 0:
                stream.height, stream.width = picture.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            count += 1
        if count:
            container.mux(stream.encode())
    return count


def _pictures(clips: Iterable[Clip], fps: float, hold_s: float) -> Iterator[NDArray[np.uint8]]:
    for clip in clips:
        steps = len(clip.values)
        for step in range(steps):
            yield draw(clip, step)
        for _ in range(round(hold_s * fps) if steps else 0):
            yield draw(clip, steps - 1, ended=True)


def draw(clip: Clip, step: int, *, ended: bool = False) -> NDArray[np.uint8]:
    """One picture, uint8 [H, W, 3] (both even): title, cameras side by side, value curve up to `step`."""
    width = VIEW * len(clip.images)
    picture = Image.new("RGB", (width, HEAD + VIEW + PANEL), _PAPER)
    for i, frames in enumerate(clip.images.values()):
        view = Image.fromarray(frames[step]).resize((VIEW, VIEW), Image.Resampling.BICUBIC)
        picture.paste(view, (i * VIEW, HEAD))
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(15)
    pen.text((MARGIN, 6), clip.title, fill=_INK, font=font)
    verdict, colour = _verdict(clip, step, ended)
    pen.text((width - MARGIN, 6), verdict, fill=colour, font=font, anchor="ra")
    _curve(pen, clip, step, width)
    return np.asarray(picture)


def _verdict(clip: Clip, step: int, ended: bool) -> tuple[str, tuple[int, int, int]]:
    if ended and clip.success is not None:
        return ("success", _GOOD) if clip.success else ("failure", _BAD)
    if clip.intervention is not None and clip.intervention[step]:
        return "human", _HUMAN
    value = float(clip.values[step])
    return (f"value {value:+.2f}", _SOFT) if np.isfinite(value) else ("", _SOFT)


def _curve(pen: ImageDraw.ImageDraw, clip: Clip, step: int, width: int) -> None:
    top, bottom = HEAD + VIEW + MARGIN, HEAD + VIEW + PANEL - MARGIN
    span = max(1, len(clip.values) - 1)
    for level in (0.0, -0.5, -1.0):
        y = top - level * (bottom - top)
        pen.line((MARGIN, y, width - MARGIN, y), fill=_LINE)
        pen.text((MARGIN, y), f"{level:g}", fill=_SOFT, font=ImageFont.load_default(10), anchor="ld" if level else "la")
    points = [
        (MARGIN + i / span * (width - 2 * MARGIN), top - float(value) * (bottom - top))
        for i, value in enumerate(clip.values[: step + 1])
        if np.isfinite(value)
    ]
    if len(points) > 1:
        pen.line(points, fill=_GOOD, width=3, joint="curve")
    if points:
        x, y = points[-1]
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=_INK)
