"""Plots of runs and evaluations as SVG bytes (Agg, no global state). Colours read with any colour vision."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

INK, SOFT, LINE = "#1c2733", "#5d6b7a", "#e3e8ee"
GOOD, BAD, ACCENT, HUMAN = "#12756f", "#b8432f", "#2f5d9b", "#d99a2b"
STYLE: Any = {
    "font.size": 10.5, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": LINE,
    "xtick.color": SOFT, "ytick.color": SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "grid.color": LINE, "grid.linewidth": 0.8, "axes.axisbelow": True, "svg.hashsalt": "recap", "svg.fonttype": "path",
}  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A measured value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Arm:
    """One policy of a comparison. success in [0, 1]; throughput in successes per minute (or another rate)."""

    name: str
    success: Interval
    throughput: Interval | None = None
    highlight: bool = False


@dataclass(frozen=True)
class Curve:
    """Values [T] in [-1, 0] of one episode, and how it ended (None: not known)."""

    values: NDArray[np.floating]
    success: bool | None
    label: str = ""


def comparison(arms: Sequence[Arm], *, rate: str = "successes per minute") -> bytes:
    """Success rate and throughput of every arm as bars with 95 % intervals."""
    two = any(arm.throughput for arm in arms)
    with rc_context(STYLE):
        chart = Figure(figsize=(10, 1.1 + 0.42 * len(arms)), layout="constrained")
        left, *right = chart.subplots(1, 2 if two else 1, sharey=True, squeeze=False).ravel()
        colours = [GOOD if arm.highlight else ACCENT for arm in arms]
        _bars(left, [arm.name for arm in arms], [arm.success for arm in arms], colours)
        left.set(title="Success rate", xlim=(0, 1))
        left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        left.invert_yaxis()
        for axes in right:
            _bars(axes, [arm.name for arm in arms], [arm.throughput or Interval(0, 0, 0) for arm in arms], colours)
            axes.set(title=f"Throughput ({rate})")
            axes.set_xlim(left=0)
        return _svg(chart)


def value_curves(curves: Sequence[Curve]) -> bytes:
    """Value over the share of the episode, successes and failures apart: does the critic see them differ?"""
    with rc_context(STYLE):
        chart = Figure(figsize=(10, 3.4), layout="constrained")
        axes = chart.subplots()
        named: set[str] = set()
        for curve in curves:
            name = {True: "success", False: "failure", None: "outcome not known"}[curve.success]
            colour = {True: GOOD, False: BAD, None: SOFT}[curve.success]
            share = np.linspace(0, 1, len(curve.values))
            axes.plot(
                share, curve.values, color=colour, alpha=0.55, linewidth=1.3, label=None if name in named else name
            )
            named.add(name)
        axes.set(ylim=(-1.03, 0.03), xlim=(0, 1), xlabel="share of the episode", ylabel="value V")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if named:
            axes.legend(frameon=False, loc="lower left")
        return _svg(chart)


def latency_histogram(latencies_ms: NDArray[np.floating], *, period_ms: float, count: str = "requests") -> bytes:
    """Time from request to chunk at the robot, with median, 99th percentile and the control period. count: of what."""
    with rc_context(STYLE):
        chart = Figure(figsize=(10, 2.8), layout="constrained")
        axes = chart.subplots()
        if len(latencies_ms):
            p50, p99 = np.percentile(latencies_ms, [50, 99])
            top = max(float(latencies_ms.max()), period_ms) * 1.08
            axes.hist(latencies_ms, bins=np.linspace(0, top, 80).tolist(), color=ACCENT)
            for at, text, colour in ((p50, f"p50 {p50:.1f} ms", INK), (p99, f"p99 {p99:.1f} ms", BAD)):
                axes.axvline(at, color=colour, linewidth=1.4, label=text)
        axes.axvline(period_ms, color=HUMAN, linestyle="--", linewidth=1.4, label=f"control period {period_ms:.0f} ms")
        axes.set(xlabel="latency of an action chunk [ms]", ylabel=count)
        axes.legend(frameon=False)
        return _svg(chart)


def audit_bars(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Positive and negative frames of each kind; rows as in audit.json (task, demonstration, success, ...)."""
    names = [_kind(row) for row in rows]
    positive = np.array([row["positive"] for row in rows], float)
    frames = np.array([row["frames"] for row in rows], float)
    with rc_context(STYLE):
        chart = Figure(figsize=(10, 0.9 + 0.3 * max(1, len(rows))), layout="constrained")
        axes = chart.subplots()
        axes.barh(names, positive, color=GOOD, label="positive")
        axes.barh(names, frames - positive, left=positive, color="#c9d2dc", label="negative")
        for i, (good, count) in enumerate(zip(positive, frames, strict=True)):
            axes.annotate(f" {good / max(count, 1):.0%}", (count, i), va="center", fontsize=9, color=SOFT)
        axes.set(xlabel="frames")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        chart.legend(frameon=False, loc="outside upper right", ncols=2)
        return _svg(chart)


def training_curves(series: Mapping[str, tuple[NDArray[np.floating], NDArray[np.floating]]]) -> bytes:
    """One small chart a series: name -> (steps [N], values [N])."""
    columns = min(3, max(1, len(series)))
    lines = -(-max(1, len(series)) // columns)
    with rc_context(STYLE):
        chart = Figure(figsize=(10, 2.3 * lines), layout="constrained")
        grid = chart.subplots(lines, columns, squeeze=False).ravel()
        for axes, (name, (steps, values)) in zip(grid, series.items(), strict=False):
            axes.plot(steps, values, color=ACCENT, linewidth=1.3)
            axes.set(title=name, xlabel="step")
        for axes in grid[len(series) :]:
            axes.set_axis_off()
        return _svg(chart)


def _kind(row: Mapping[str, Any]) -> str:
    who = "demonstration" if row["demonstration"] else ("human takeover" if row["intervention"] else "rollout")
    return f"{row['task']}, {who}, {'success' if row['success'] else 'failure'}"


def _bars(axes: Axes, names: Sequence[str], intervals: Sequence[Interval], colours: Sequence[str]) -> None:
    values = np.array([item.value for item in intervals])
    spread = np.array([[item.value - item.low, item.high - item.value] for item in intervals]).T.clip(min=0)
    axes.barh(
        names,
        values,
        xerr=spread,
        color=colours,
        height=0.62,
        error_kw={"ecolor": INK, "elinewidth": 1.1, "capsize": 3},
    )
    widest = max([item.high for item in intervals], default=1.0)
    for i, item in enumerate(intervals):
        inside = item.value > 0.12 * widest
        axes.annotate(
            f"{item.value:.2f}",
            (0, i),
            (5, 0),
            textcoords="offset points",
            va="center",
            color="white" if inside else INK,
            fontsize=9,
        )
    axes.grid(axis="y", visible=False)


def _svg(chart: Figure) -> bytes:
    stream = io.BytesIO()
    chart.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
