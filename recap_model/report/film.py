"""An episode at a glance: a strip of camera frames, and under each frame the value the critic gave it."""

import io

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from recap_model.report.plots import BAD, GOOD, HUMAN, INK, LINE, SOFT, STYLE


def film_strip(
    frames: NDArray[np.uint8],
    values: NDArray[np.floating],
    *,
    title: str,
    control_hz: float,
    success: bool | None = None,
    intervention: NDArray[np.bool_] | None = None,
    columns: int = 10,
) -> bytes:
    """PNG of `columns` evenly spaced frames above the value curve, both on one time axis.

    frames uint8 [T, H, W, 3]; values [T] in [-1, 0] (NaN where not known); intervention [T]: shaded as human control.
    """
    steps = len(frames)
    if steps == 0 or len(values) != steps:
        raise ValueError(
            f"film strip: expected as many values as frames and at least one, got {len(values)} and {steps}"
        )
    picks = np.linspace(0, steps - 1, min(columns, steps)).round().astype(int)
    strip = np.concatenate([_framed(frames[i]) for i in picks], axis=1)
    seconds = np.arange(steps) / control_hz
    spacing = seconds[-1] / (len(picks) - 1) if len(picks) > 1 else 1 / control_hz
    span = (-spacing / 2, seconds[-1] + spacing / 2)  # each frame is centred over its own moment
    colour = {True: GOOD, False: BAD, None: SOFT}[success]
    with rc_context(STYLE):
        left, right, axis, curve, head = 0.75, 0.1, 0.5, 1.25, 0.32  # margins and heights in inches
        width = 10.0
        height = (width - left - right) * strip.shape[0] / strip.shape[1]
        total = axis + curve + 0.1 + height + head
        chart = Figure(figsize=(width, total), dpi=110)
        inner = 1 - (left + right) / width
        top = chart.add_axes((left / width, (axis + curve + 0.1) / total, inner, height / total))
        bottom = chart.add_axes((left / width, axis / total, inner, curve / total))
        top.imshow(strip, aspect="auto", interpolation="bicubic")
        top.set_axis_off()
        top.set_title(title, parse_math=False, color=INK if success is None else colour)
        bottom.plot(seconds, values, color=colour, linewidth=1.8)
        bottom.plot(seconds[picks], np.asarray(values)[picks], "o", color=INK, markersize=3)
        if intervention is not None and intervention.any():
            where = np.asarray(intervention, bool)
            bottom.fill_between(seconds, -1.05, 0.05, where=where.tolist(), color=HUMAN, alpha=0.25, label="human")
            bottom.legend(frameon=False, loc="lower right")
        bottom.set(ylim=(-1.05, 0.05), xlim=span, ylabel="value", xlabel="time [s]")
        stream = io.BytesIO()
        chart.savefig(stream, format="png")
        return stream.getvalue()


def _framed(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The frame with a thin light border, so that neighbours in the strip stay apart."""
    border = np.array([int(LINE[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)
    out = np.empty((frame.shape[0] + 2, frame.shape[1] + 2, 3), np.uint8)
    out[:] = border
    out[1:-1, 1:-1] = frame
    return out
