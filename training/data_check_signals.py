"""Checks of the numbers: finite, evenly spaced in time, moving, within the robot's limits, recorded once."""

from collections.abc import Iterator
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from recap_client.spec import RobotSpec
from training import columns
from training.data_check_files import VECTORS, Loose, Problem, Severity, vector
from training.lerobot_files import SPEC_FILE

_TIME_TOLERANCE = 1e-4
"""s: what LeRobot allows between a timestamp and frame_index / fps."""


def finite_problems(loose: Loose) -> Iterator[Problem]:
    """NaN, infinity and empty cells, by column and dimension."""
    for name, values in loose.columns.items():
        if name in columns.OUTCOME_COLUMNS:
            continue
        severity: Severity = "error" if name in VECTORS else "warning"
        if values.dtype == object:
            empty = np.flatnonzero([value is None for value in values])
            if empty.size:
                yield Problem(severity, "finite", f"{empty.size} empty cells, {_place(loose, empty[0])}", column=name)
        elif values.dtype.kind == "f":
            data = values.reshape(len(values), -1)
            for dim in np.flatnonzero(~np.isfinite(data).all(0)):
                bad = np.flatnonzero(~np.isfinite(data[:, dim]))
                text = f"{bad.size} frames are not finite, {_place(loose, bad[0])}: {data[bad[0], dim]}"
                yield Problem(severity, "finite", text, column=f"{name}{_dim(loose, name, int(dim))}")


def _place(loose: Loose, row: int) -> str:
    for index, rows in loose.runs:
        if rows.start <= row < rows.stop:
            return f"the first in episode {index}, frame {row - rows.start}"
    return f"the first in row {row}"


def _dim(loose: Loose, column: str, dim: int) -> str:
    if column not in VECTORS:
        return ""
    dims = () if loose.spec is None else loose.spec.action if column == "action" else loose.spec.state
    names = [item.name for item in dims]
    return f"[{names[dim] if dim < len(names) else dim}]"


def time_problems(loose: Loose) -> Iterator[Problem]:
    """Timestamps against fps: a jump of half a frame or more is an error, because actions are taken to be 1 / fps
    apart; less than LeRobot's tolerance is nothing."""
    stamps, step = loose.columns.get("timestamp"), 1.0 / loose.fps
    if stamps is None or stamps.dtype.kind != "f" or not np.isfinite(step):
        return
    for index, rows in loose.runs:
        times = stamps[rows].astype(np.float64)
        off = np.abs(np.diff(times) - step)
        tolerance = _TIME_TOLERANCE + 4 * np.spacing(np.abs(stamps[rows][1:])).astype(np.float64)
        bad = np.flatnonzero(off > tolerance)
        if bad.size:
            worst = int(bad[np.argmax(off[bad])])
            gap = times[worst + 1] - times[worst]
            text = f"{bad.size} steps are not {step:g} s ({loose.fps:g} fps), the worst: {gap:g} s, frame {worst + 1}"
            yield Problem("error" if off[worst] >= step / 2 else "warning", "time", text, index, "timestamp")


def frozen_problems(loose: Loose) -> Iterator[Problem]:
    """State dimensions that do not move over a whole episode while others do."""
    state = vector(loose, "observation.state")
    if state is None or not len(state):
        return
    never = np.ptp(state, axis=0) == 0
    for dim in np.flatnonzero(never):
        text = f"constant at {state[0, dim]:g} in all frames of all episodes"
        yield Problem(
            "warning", "frozen", text, column=f"observation.state{_dim(loose, 'observation.state', int(dim))}"
        )
    for index, rows in loose.runs:
        still = np.ptp(state[rows], axis=0) == 0
        if rows.stop - rows.start < 2:
            continue
        if still.all():
            yield Problem("warning", "frozen", "nothing of the state moves", index, "observation.state")
            continue
        for dim in np.flatnonzero(still & ~never):
            text = f"constant at {state[rows.start, dim]:g} for all {len(state[rows])} frames while others move"
            yield Problem("warning", "frozen", text, index,
                          f"observation.state{_dim(loose, 'observation.state', int(dim))}")  # fmt: skip


def limit_problems(loose: Loose) -> Iterator[Problem]:
    """Actions that the robot would not accept; only where the limits are stated."""
    action = vector(loose, "action")
    spec: RobotSpec | None = loose.spec if (loose.root / SPEC_FILE).is_file() else None
    if action is None or spec is None or action.shape[1] != len(spec.action):
        return
    for number, dim in enumerate(spec.action):
        values: NDArray[np.float64] = action[:, number].astype(np.float32)
        bad = np.flatnonzero((values < np.float32(dim.low)) | (values > np.float32(dim.high)))
        if bad.size:
            text = (
                f"{bad.size} frames outside {dim.low:g} to {dim.high:g} {dim.unit} ({SPEC_FILE}): "
                f"{np.nanmin(values):g} to {np.nanmax(values):g}, {_place(loose, int(bad[0]))}"
            )
            yield Problem("warning", "limits", text, column=f"action[{dim.name}]")


def short_problems(loose: Loose) -> Iterator[Problem]:
    for index, rows in loose.runs:
        if rows.stop - rows.start == 1:
            yield Problem("warning", "short", "one frame: there is no motion in it to learn from", index)


def duplicate_problems(loose: Loose) -> Iterator[Problem]:
    """Episodes with equal state bytes: one recording twice counts twice, and leaks from training into held-out data."""
    state = vector(loose, "observation.state")
    seen: dict[bytes, int] = {}
    for index, rows in loose.runs:
        if state is None:
            return
        first = seen.setdefault(sha256(np.ascontiguousarray(state[rows]).tobytes()).digest(), index)
        if first != index:
            yield Problem("warning", "duplicate", f"the same states as episode {first}", index, "observation.state")
