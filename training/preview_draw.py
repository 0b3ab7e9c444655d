"""How a preview of labels looks: a grid of clips, each framed in the colour of the label of the frame on show."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from recap_model import conditioning

if TYPE_CHECKING:
    from training.preview import Shot

VIEW, EDGE, BAR, TEXT, HEAD, MARGIN = 132, 5, 8, 34, 40, 10
"""In pixels: height of the cameras, width of the coloured frame, height of time bar, caption and title; gap."""
CELL = 300
"""Width of a clip with its coloured frame, in pixels."""
INK, SOFT, LINE, PAPER = (28, 39, 51), (93, 107, 122), (227, 232, 238), (255, 255, 255)
COLOURS = {conditioning.POSITIVE: (18, 117, 111), conditioning.NEGATIVE: (184, 67, 47),
           conditioning.NONE: (150, 160, 170)}  # fmt: skip
NAMES = {conditioning.POSITIVE: "positive", conditioning.NEGATIVE: "negative", conditioning.NONE: "none"}
_ROW = 22 + VIEW + 2 * EDGE + BAR + TEXT + MARGIN


def draw_page(task: str, kinds: Sequence[str], shots: Sequence["Shot"], columns: int, step: int) -> NDArray[np.uint8]:
    """One picture of the film, uint8 [H, W, 3], both even and the same for every task: each clip at frame `step`; a
    clip that is over stays at its end."""
    return _grid(task, kinds, shots, columns, [min(step, len(shot.frames) - 1) for shot in shots])


def draw_sheet(task: str, kinds: Sequence[str], shots: Sequence["Shot"], columns: int) -> NDArray[np.uint8]:
    """One task of the contact sheet: each clip at its moment."""
    return _grid(task, kinds, shots, columns, [shot.moment.frame - shot.moment.start for shot in shots])


def page_size(kinds: Sequence[str], columns: int) -> tuple[int, int]:
    """(height, width) of a page [px], even as H.264 wants them."""
    height, width = HEAD + len(kinds) * _ROW + MARGIN, 2 * MARGIN + columns * (CELL + MARGIN)
    return height + height % 2, width + width % 2


def _grid(
    task: str, kinds: Sequence[str], shots: Sequence["Shot"], columns: int, steps: Sequence[int]
) -> NDArray[np.uint8]:
    height, width = page_size(kinds, columns)
    picture = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(picture)
    _text(pen, (MARGIN, 10), task, 17, INK, width - 2 * MARGIN)
    for line, kind in enumerate(kinds):
        top = HEAD + line * _ROW
        _text(pen, (MARGIN, top), f"{kind} frames", 13, SOFT, width)
        cells = [(shot, step) for shot, step in zip(shots, steps, strict=True) if shot.moment.kind == kind]
        if not cells:
            _text(pen, (MARGIN, top + 24), "none in this task", 13, SOFT, width)
        for column, (shot, step) in enumerate(cells):
            _cell(picture, pen, (MARGIN + column * (CELL + MARGIN), top + 20), shot, step)
    return np.asarray(picture)


def _cell(picture: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], shot: "Shot", step: int) -> None:
    """A clip at one of its frames: the cameras in a coloured frame, the labels of the clip as a bar, two lines."""
    left, top = corner
    shown = int(shot.indicator[step])
    pen.rectangle((left, top, left + CELL - 1, top + VIEW + 2 * EDGE - 1), fill=COLOURS[shown])
    room = (CELL - 2 * EDGE, VIEW)
    frame = shot.frames[step]
    scale = min(room[0] / frame.shape[1], room[1] / frame.shape[0])
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    pen.rectangle((left + EDGE, top + EDGE, left + CELL - EDGE - 1, top + EDGE + VIEW - 1), fill=INK)
    view = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)
    picture.paste(view, (left + EDGE + (room[0] - size[0]) // 2, top + EDGE + (room[1] - size[1]) // 2))
    under = top + VIEW + 2 * EDGE
    _bar(pen, left, under, shot, step)
    moment = shot.moment
    figures = f"advantage {shot.advantage[step]:+.3f}, threshold {shot.threshold[step]:+.3f}"
    if not np.isfinite(shot.advantage[step]):
        figures = "advantage not known"
    _text(pen, (left, under + BAR + 2), f"{NAMES[shown]}, {figures}", 12, COLOURS[shown], CELL)
    where = f"episode {shot.episode}, frame {moment.start + step}"
    marked = f", marked {moment.frame} ({shot.source})"
    _text(pen, (left, under + BAR + 17), where + marked, 11, SOFT, CELL)


def _bar(pen: ImageDraw.ImageDraw, left: int, top: int, shot: "Shot", step: int) -> None:
    """The labels of the clip's frames from left to right; a notch at the moment, a line at the frame on show."""
    count = len(shot.indicator)
    edges = [left + round(i * CELL / count) for i in range(count + 1)]
    for i, indicator in enumerate(shot.indicator.tolist()):
        pen.rectangle((edges[i], top + 2, max(edges[i], edges[i + 1] - 1), top + BAR - 2), fill=COLOURS[indicator])
    at = shot.moment.frame - shot.moment.start
    middle = (edges[at] + edges[at + 1]) // 2
    pen.polygon(((middle - 4, top + BAR), (middle + 4, top + BAR), (middle, top + 3)), fill=INK)
    here = (edges[step] + edges[step + 1]) // 2
    pen.line((here, top, here, top + BAR - 1), fill=INK, width=2)


def _text(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], room: int
) -> None:
    """One line, cut to `room` pixels."""
    font = ImageFont.load_default(size)
    line = " ".join(text[:300].split())
    while len(line) > 1 and pen.textlength(line, font=font) > room:
        line = line[:-2].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
    pen.text(at, line, fill=colour, font=font)
