"""What the columns of a dataset mean for RECAP: outcomes, interventions, demonstrations. numpy only.

Data comes from many recorders, so each fact is read under every name in use; facts that contradict each other are an
error that names both columns, never a silent choice.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

OUTCOME_COLUMNS = ("success", "next.success", "is_success", "episode_success")
"""Per frame or per episode. Per frame: either the episode's outcome on every frame, or 0 ... 0 1 ... 1."""

REWARD_COLUMNS = ("next.reward", "reward")
EXTRA_COLUMNS = ("next.done", "is_terminal", "reasoning", "action_is_pad", "reward_label", "value_label", "adv_ind")
LOSS_MASK = "loss_mask_"
"""Prefix of the columns that say, frame by frame, whether a group of action dimensions (an arm) is learned: 1 or 0."""


class DatasetError(ValueError):
    """A dataset cannot be read or contradicts itself; the message names episode, column, expected and got."""


def frame_outcomes(column: str, values: NDArray[Any], starts: NDArray[np.int64]) -> list[bool | None]:
    """One outcome per episode from a column with a value per frame [F]. starts: first row of every episode [E].

    An episode that is NaN throughout has no outcome; one that is NaN in part, or falls from 1 back to 0, is refused.
    """
    data = _as_float(column, values)
    result: list[bool | None] = []
    for index, rows in enumerate(np.split(data, starts[1:])):
        missing = np.isnan(rows)
        if missing.all():
            result.append(None)
            continue
        if missing.any() or not np.isin(rows, (0.0, 1.0)).all() or (np.diff(rows) < 0).any():
            raise DatasetError(
                f"episode {index}: column {column!r}: expected one outcome (0 or 1 on every frame, or 0 "
                f"that turns to 1), got {_shorten(rows)}"
            )
        result.append(bool(rows[-1]))
    return result


def episode_outcomes(column: str, values: NDArray[Any]) -> list[bool | None]:
    """One outcome per episode from a column of the episode table [E]."""
    data = _as_float(column, values)
    bad = np.flatnonzero(~(np.isnan(data) | np.isin(data, (0.0, 1.0))))
    if bad.size:
        raise DatasetError(f"episode {bad[0]}: column {column!r}: expected 0 or 1, got {data[bad[0]]}")
    return [None if np.isnan(value) else bool(value) for value in data]


def agree(found: Mapping[str, list[bool | None]], episodes: int) -> list[bool | None]:
    """Merge the outcomes read from several columns (name -> one per episode); a contradiction is an error."""
    result: list[bool | None] = [None] * episodes
    said_by = [""] * episodes
    for column, outcomes in found.items():
        for index, outcome in enumerate(outcomes):
            if outcome is None:
                continue
            if result[index] is not None and result[index] != outcome:
                raise DatasetError(
                    f"episode {index}: outcome columns contradict each other: {said_by[index]!r} says "
                    f"{_word(result[index])}, {column!r} says {_word(outcome)}; correct or drop one"
                )
            result[index], said_by[index] = outcome, column
    return result


def labelled_outcome(values: NDArray[Any] | None) -> bool | None:
    """The outcome that an episode's `value_label` of openpi forks tells: its last value is near 0 after a success and
    the penalty -1 after a failure. None without the column, or when it ends in NaN."""
    last = None if values is None else np.ravel(values)[-1]
    return None if last is None or not np.isfinite(last) else bool(last > -0.5)


def flags(column: str, values: NDArray[Any]) -> NDArray[np.bool_]:
    """A 0/1 column as bool [F]."""
    data = _as_float(column, values)
    bad = np.flatnonzero(~np.isin(data, (0.0, 1.0)))
    if bad.size:
        raise DatasetError(f"column {column!r}: expected 0 or 1, got {data[bad[0]]} in row {bad[0]}")
    return data > 0


def extra_columns(names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that an episode carries along as it finds them."""
    return tuple(name for name in names if name in EXTRA_COLUMNS or name.startswith(LOSS_MASK))


def padding(values: NDArray[Any]) -> NDArray[np.bool_]:
    """The column `action_is_pad` as bool: [F], or [F, H] where a frame has one flag for each step of its chunk."""
    if values.dtype == object:  # lists of booleans
        sizes = sorted({np.size(value) for value in values})
        if len(sizes) != 1:
            raise DatasetError(f"column 'action_is_pad': expected chunks of one length, got the lengths {sizes}")
        values = np.array([np.asarray(value) for value in values])
    flat = flags("action_is_pad", values)
    return flat.reshape(len(values), -1) if values.size > len(values) else flat


def require_finite(
    column: str, values: NDArray[Any], episode: NDArray[np.int64], frame: NDArray[np.int64], names: tuple[str, ...]
) -> None:
    """Refuse NaN and infinity in a vector column [F, D], naming the first place."""
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, dim = (int(number) for number in bad[0])
        raise DatasetError(
            f"episode {episode[row]}, frame {frame[row]}: {column}[{names[dim]}]: expected a finite number, "
            f"got {values[row, dim]} ({len(bad)} such entries); remove or repair the episode"
        )


def _as_float(column: str, values: NDArray[Any]) -> NDArray[np.float64]:
    try:
        return (
            np.asarray([np.nan if value is None else value for value in values.reshape(-1)], np.float64)
            if values.dtype == object
            else values.reshape(-1).astype(np.float64)
        )
    except (TypeError, ValueError) as error:
        raise DatasetError(f"column {column!r}: expected numbers or booleans, got {values.dtype} ({error})") from error


def _shorten(rows: NDArray[np.float64]) -> str:
    text = " ".join(f"{value:g}" for value in rows[:12])
    return text + (" ..." if len(rows) > 12 else "")


def _word(outcome: bool | None) -> str:
    return "success" if outcome else "failure"
