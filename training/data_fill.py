"""What `recap data merge --fill-missing` writes into a column that a dataset does not have: what the dataset reads as
without it, or else a value that says "unknown"."""

from typing import Any

import numpy as np
import pyarrow as pa

from training.columns import LOSS_MASK, OUTCOME_COLUMNS, REWARD_COLUMNS
from training.dataset import Episode

_LAST = ("next.done", "is_terminal")
_WORDS = {
    "intervention": "0, nobody took over",
    "demonstration": "the episode as it is read without the column (0 or 1)",
    "timestamp": "frame_index / fps",
    "adv_ind": "no label (none, or -1)",
    **dict.fromkeys(_LAST, "true on the last frame"),
    **dict.fromkeys(OUTCOME_COLUMNS, "the episode's outcome, null where it is unknown"),
    **dict.fromkeys(REWARD_COLUMNS, "the recorded reward, NaN where there is none"),
}


def fill_words(column: str, kind: pa.DataType) -> str:
    """What `fill` writes into a frame column, in words."""
    if column in _WORDS:
        return _WORDS[column]
    if column.startswith(LOSS_MASK):
        return "1, learned"
    value = _blank(kind)
    if isinstance(value, list):
        value = value[0] if value else "an empty list"
    return {None: "null", "": "empty text"}.get(value, str(value))  # type: ignore[call-overload]


def fill(column: str, kind: pa.DataType, episode: Episode) -> pa.Array:
    """A value for every frame [T] of an episode whose dataset lacks `column`."""
    steps = len(episode)
    known: dict[str, Any] = {
        "intervention": False,
        "demonstration": episode.demonstration,
        "adv_ind": "none" if _is_text(kind) else -1,
        **dict.fromkeys(OUTCOME_COLUMNS, episode.success),
    }
    if column.startswith(LOSS_MASK):
        known[column] = True
    if column in known:
        values = [known[column]] * steps
    elif column in _LAST:
        values = [row == steps - 1 for row in range(steps)]
    elif column == "timestamp":
        values = (np.arange(steps) / episode.fps).tolist()
    elif column in REWARD_COLUMNS:
        values = [np.nan] * steps if episode.reward is None else episode.reward.tolist()
    else:
        values = [_blank(kind)] * steps
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = [None if value is None else float(value) for value in values]
        if pa.types.is_integer(kind):
            values = [None if value is None or np.isnan(value) else int(value) for value in values]
    return pa.array(values, type=kind)


def _blank(kind: pa.DataType) -> Any:
    if pa.types.is_fixed_size_list(kind):
        return [_blank(kind.value_type)] * kind.list_size
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return []
    if pa.types.is_floating(kind):
        return float("nan")
    if pa.types.is_boolean(kind):
        return False
    if pa.types.is_integer(kind):
        return 0
    return "" if _is_text(kind) else None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
