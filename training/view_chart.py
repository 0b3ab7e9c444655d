"""One episode as a chart: film strips of all cameras over one time axis, curves and bands of the labels below."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from recap_client.images import encode_jpeg
from recap_model import conditioning
from recap_model.report.plots import ACCENT, BAD, GOOD, HUMAN, INK, SOFT
from training.view_page import NEUTRAL, runs, style

WIDTH, LEFT, RIGHT, GAP = 10.0, 0.95, 0.12, 0.1
"""Of the chart, in inches."""
FRAME_PX = 160
"""Height that frames are reduced to; smaller ones stay as they are."""
Place = tuple[float, float, float, float]
"""x, y, width and height in points from the upper left corner."""
_PANEL = {"value": (0.16, 1.2), "advantage": (0.26, 1.2), "indicator": (GAP, 0.3), "takeover": (GAP, 0.3)}
"""Room above a panel and its height, in inches."""
_INDICATOR = ((conditioning.POSITIVE, GOOD, "positive"), (conditioning.NEGATIVE, BAD, "negative"),
              (conditioning.NONE, NEUTRAL, "none"))  # fmt: skip


@dataclass(frozen=True)
class Tracks:
    """What is known of the frames of an episode (or of a whole dataset), each [T] or None: value and return in [-1, 0],
    advantage and threshold in the same unit, indicator int8 (1, 0, -1 none)."""

    value: NDArray[np.float64] | None = None
    returns: NDArray[np.float64] | None = None
    advantage: NDArray[np.float64] | None = None
    threshold: NDArray[np.float64] | None = None
    indicator: NDArray[np.int8] | None = None

    def part(self, rows: slice) -> "Tracks":
        """The same of some frames."""
        return Tracks(**{name: None if getattr(self, name) is None else getattr(self, name)[rows]
                         for name in self.__dataclass_fields__})  # fmt: skip


def episode_chart(
    images: Mapping[str, NDArray[np.uint8]],
    tracks: Tracks,
    *,
    intervention: NDArray[np.bool_],
    fps: float,
    columns: int = 10,
) -> bytes:
    """SVG of one episode of T frames.

    images: camera -> uint8 [T, H, W, 3], one strip each of `columns` evenly spaced frames, each centred over its own
    moment; intervention bool [T] is hatched. Only panels with something to show are drawn.
    Raises ValueError when the lengths differ.
    """
    steps = len(intervention)
    _require_lengths(images, tracks, steps)
    picks = np.linspace(0, steps - 1, min(columns, steps)).round().astype(int)
    seconds = np.arange(steps) / fps
    spacing = seconds[-1] / (len(picks) - 1) if len(picks) > 1 else 1 / fps
    span = (float(-spacing / 2), float(seconds[-1] + spacing / 2))
    strips = {camera: strip(frames[picks]) for camera, frames in images.items()}
    panels = _panels(tracks)
    inner = WIDTH - LEFT - RIGHT
    heights = [inner * picture.shape[0] / picture.shape[1] for picture in strips.values()]
    total = 0.1 + sum(heights) + GAP * len(heights) + sum(sum(_PANEL[name]) for name in panels) + 0.45
    with style():
        chart = Figure(figsize=(WIDTH, total), dpi=72)
        top = total - 0.1
        places: list[Place] = []
        for camera, height in zip(strips, heights, strict=True):
            top -= height
            places.append((LEFT * 72, (total - top - height) * 72, inner * 72, height * 72))
            chart.text((LEFT - 0.08) / WIDTH, (top + height / 2) / total, _short(camera), ha="right", va="center",
                       color=SOFT, fontsize=9)  # fmt: skip
            top -= GAP
        axes: Any = None
        for name in panels:
            above, height = _PANEL[name]
            top -= above + height
            axes = chart.add_axes((LEFT / WIDTH, top / total, inner / WIDTH, height / total))
            _DRAW[name](axes, seconds, tracks, intervention, 1 / fps)
            _hatch(axes, seconds, intervention, 1 / fps)
            axes.set_xlim(*span)
            axes.tick_params(labelbottom=False)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("time [s]")
        stream = io.BytesIO()
        chart.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    return _with_images(stream.getvalue(), list(strips.values()), places)


def strip(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames [N, H, W, 3] side by side with thin lines between them, reduced to a height of at most FRAME_PX: uint8
    [h, N * w, 3]."""
    height, width = frames.shape[1:3]
    scale = min(1.0, FRAME_PX / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames]
    joined = np.concatenate([np.asarray(frame) for frame in small], axis=1)
    for edge in range(size[0], joined.shape[1], size[0]):
        joined[:, edge - 1 : edge + 1] = 255
    return joined


def _require_lengths(images: Mapping[str, NDArray[np.uint8]], tracks: Tracks, steps: int) -> None:
    given: dict[str, Any] = {**images, **{name: getattr(tracks, name) for name in tracks.__dataclass_fields__}}
    lengths = {name: len(values) for name, values in given.items() if values is not None}
    if steps == 0 or any(length != steps for length in lengths.values()):
        raise ValueError(f"episode chart: expected {steps} frames (at least one) of everything, got {lengths}")


def _panels(tracks: Tracks) -> list[str]:
    shown = {
        "value": tracks.value is not None or tracks.returns is not None,
        "advantage": tracks.advantage is not None,
        "indicator": tracks.indicator is not None,
    }
    names = [name for name, there in shown.items() if there]
    return names or ["takeover"]  # without labels a thin axis carries the time and the takeovers


def _value(axes: Any, seconds: NDArray[Any], tracks: Tracks, *_: Any) -> None:
    if tracks.returns is not None:
        axes.plot(seconds, tracks.returns, color=SOFT, linewidth=1.3, linestyle="--", label="return")
    if tracks.value is not None:
        axes.plot(seconds, tracks.value, color=ACCENT, linewidth=1.8, label="value")
    axes.set(ylim=(-1.08, 0.08), ylabel="value")
    _legend(axes)


def _advantage(axes: Any, seconds: NDArray[Any], tracks: Tracks, *_: Any) -> None:
    assert tracks.advantage is not None
    axes.plot(seconds, tracks.advantage, color=INK, linewidth=1.4, label="advantage")
    if tracks.threshold is not None:
        axes.plot(seconds, tracks.threshold, color=ACCENT, linewidth=1.1, linestyle=":", label="threshold")
        for above, colour in ((True, GOOD), (False, BAD)):
            where = (tracks.advantage > tracks.threshold) == above
            axes.fill_between(seconds, tracks.advantage, tracks.threshold, where=where.tolist(), color=colour,
                              alpha=0.25, linewidth=0, interpolate=True)  # fmt: skip
    axes.set_ylabel("advantage")
    _legend(axes)


def _indicator(axes: Any, seconds: NDArray[Any], tracks: Tracks, _: Any, step: float) -> None:
    assert tracks.indicator is not None
    for which, colour, label in _INDICATOR:
        parts = runs(tracks.indicator == which)
        if parts:
            bars = [(seconds[a] - step / 2, (b - a) * step) for a, b in parts]
            axes.broken_barh(bars, (0, 1), facecolors=colour, linewidth=0, label=label)
    axes.set(ylim=(0, 1), yticks=[])
    axes.set_ylabel("label", rotation=0, ha="right", va="center")
    axes.grid(visible=False)


def _takeover(axes: Any, *_: Any) -> None:
    axes.set(ylim=(0, 1), yticks=[])
    axes.grid(visible=False)


def _hatch(axes: Any, seconds: NDArray[Any], intervention: NDArray[np.bool_], step: float) -> None:
    """Takeovers, from half a step before the first to half a step after the last frame."""
    for start, stop in runs(intervention):
        axes.axvspan(seconds[start] - step / 2, seconds[stop - 1] + step / 2, facecolor="none", edgecolor=HUMAN,
                     hatch="////", linewidth=0.8)  # fmt: skip


def _legend(axes: Any) -> None:
    """Above the panel, where it hides nothing."""
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.97), ncols=2, fontsize=8.5, borderpad=0.1)


_DRAW = {"value": _value, "advantage": _advantage, "indicator": _indicator, "takeover": _takeover}


def _with_images(svg: bytes, strips: list[NDArray[np.uint8]], places: list[Place]) -> bytes:
    """The chart with the strips as JPEG: what the drawing library embeds is PNG, five times the size."""
    parts = []
    for picture, (x, y, width, height) in zip(strips, places, strict=True):
        data = base64.b64encode(encode_jpeg(picture, 88)).decode()
        parts.append(f'<image x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
                     f'preserveAspectRatio="none" href="data:image/jpeg;base64,{data}"/>')  # fmt: skip
    head, mark, rest = svg.decode().rpartition("</svg>")
    return (head + "".join(parts) + mark + rest).encode()


def _short(text: str, limit: int = 14) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
