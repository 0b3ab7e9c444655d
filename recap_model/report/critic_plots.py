"""Plots of a critic's validation as SVG bytes, in the style of `plots`."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from recap_model.report.plots import ACCENT, BAD, GOOD, LINE, SOFT, STYLE


@dataclass(frozen=True)
class ValueAndReturn:
    """value, target (the return): [T] in [-1, 0] of one episode."""

    value: NDArray[np.floating]
    target: NDArray[np.floating]
    success: bool
    title: str


def calibration(bins: Sequence[Mapping[str, float]]) -> bytes:
    """Mean return over mean value of every bin (the diagonal is a calibrated critic), and the frames in each."""
    value, target = (np.array([row[key] for row in bins], float) for key in ("value", "return"))
    with rc_context(STYLE):
        chart = Figure(figsize=(10, 3.6), layout="constrained")
        left, right = chart.subplots(1, 2)
        left.plot([-1, 0], [-1, 0], color=SOFT, linestyle="--", linewidth=1.2, label="calibrated")
        left.plot(value, target, color=ACCENT, marker="o", linewidth=1.4, label="critic")
        left.set(title="Calibration", xlabel="mean value", ylabel="mean return", xlim=(-1.03, 0.03), ylim=(-1.03, 0.03))
        left.legend(frameon=False)
        middle = [(row["low"] + row["high"]) / 2 for row in bins]
        right.bar(middle, [row["frames"] for row in bins], width=0.09, color=ACCENT)
        right.set(title="Frames by value", xlabel="value V", xlim=(-1.03, 0.03))
        return _svg(chart)


def episodes(curves: Sequence[ValueAndReturn]) -> bytes:
    """Value and return over the frames, one small chart an episode."""
    columns = min(4, max(1, len(curves)))
    lines = -(-max(1, len(curves)) // columns)
    with rc_context(STYLE):
        chart = Figure(figsize=(10, 2.2 * lines), layout="constrained")
        grid = chart.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes, curve in zip(grid, curves, strict=False):
            _episode(axes, curve)
        for axes in grid[len(curves) :]:
            axes.set_axis_off()
        return _svg(chart)


def _episode(axes: Axes, curve: ValueAndReturn) -> None:
    frames = np.arange(len(curve.value))
    axes.fill_between(frames, curve.target, curve.value, color=LINE)
    axes.plot(frames, curve.target, color=SOFT, linestyle="--", linewidth=1.2)
    axes.plot(frames, curve.value, color=GOOD if curve.success else BAD, linewidth=1.5)
    axes.set_title(curve.title, parse_math=False, fontsize=9)
    axes.set(ylim=(-1.03, 0.03))


def _svg(chart: Figure) -> bytes:
    stream = io.BytesIO()
    chart.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
