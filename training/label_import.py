"""Labels that lie in a dataset's own columns, in and out: `adv_ind`, `value_label`, `reward_label` of openpi forks.

What a column holds decides: text is indicators, numbers are a critic's values. Datasets are never modified.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_model.advantage import Frames, LabelRules, Labels
from recap_model.audit import Audit, audit
from recap_model.conditioning import NEGATIVE, NONE, POSITIVE
from recap_model.manifest import Manifest
from recap_model.returns import HIGH, LOW, Floats, finite
from training import lerobot_files
from training.dataset import Dataset
from training.label_files import Columns, LabelError
from training.labels import (
    LabelledFrames,
    LabelledReturns,
    LabelledValues,
    frames_of,
    frames_with,
    known_outcomes,
    label_frames,
    load_returns,
    outcomes,
    publish_advantage,
)

_WORDS = {"positive": POSITIVE, "negative": NEGATIVE, "none": NONE}
_TARGET = "value_label"


def label_from_column(
    dataset: Dataset,
    column: str,
    out: Path,
    rules: LabelRules,
    *,
    returns: Path | None = None,
    reward_column: str | None = None,
) -> tuple[Manifest, Audit]:
    """Publish labels at `out` from a column of the dataset.

    Text (positive, negative, none) is imported as it is; `rules` do not matter then. Numbers in [-1, 0] are the values
    of a critic; rewards come from `returns` (a folder of `recap returns`) or from `reward_column`. Raises LabelError.
    """
    values = read_column(dataset, column)
    given = {"--returns": returns, "--reward-column": reward_column}
    if values.dtype == object:
        if extra := [flag for flag, value in given.items() if value is not None]:
            raise LabelError(
                f"--from-column {column}: the column holds text, so its indicators are taken as they are: expected no "
                f"{' and no '.join(extra)}; leave it away, or name a column of values"
            )
        return _import_indicators(dataset, column, values, out)
    if sum(value is not None for value in given.values()) != 1:
        raise LabelError(
            f"--from-column {column}: the column holds numbers, a critic's values: expected either --returns FOLDER or "
            f"--reward-column NAME for the rewards between them, got {'both' if returns else 'neither'}"
        )
    value = _values(dataset, column, values)
    if reward_column is None:
        assert returns is not None
        frames, target = frames_of(dataset, returns), load_returns(returns, dataset)
        parents = {"returns": target.hash}
    else:
        frames = frames_with(dataset, outcomes(dataset))
        target, parents = column_rewards(dataset, reward_column, frames), {}
    parameters = {"values_column": column, "reward_column": reward_column}
    warnings: tuple[str, ...] = (f"it is not known whether the critic behind {column!r} trained on these episodes",)
    if column == _TARGET:
        warnings += (
            f"{_TARGET} is what openpi forks train their critic on, not what it predicts: against itself a success has "
            "no advantage anywhere; name the column that holds predictions",
        )
    return label_frames(
        dataset, frames, target, value, out, rules, parents=parents, warnings=warnings, parameters=parameters
    )


def read_column(dataset: Dataset, name: str) -> NDArray[Any]:
    """A column with one number or text a frame, [F] in dataset order; text as object. Raises LabelError."""
    import pyarrow.parquet as pq

    files = lerobot_files.data_files(dataset.root)
    names = pq.read_schema(files[0]).names
    if name not in names:
        raise LabelError(f"{dataset.root}: column {name!r}: expected one of {sorted(names)}")
    data = lerobot_files.read_columns(files, but=[other for other in names if other != name])[name]
    if data.size != dataset.frames:
        raise LabelError(f"{dataset.root}: column {name!r}: expected one value a frame, got shape {list(data.shape)}")
    if data.dtype == object:  # text of shape (1,) may be stored as a list of one
        cells = [cell[0] if isinstance(cell, list) and len(cell) == 1 else cell for cell in data.reshape(-1)]
        return np.array([*cells, None], dtype=object)[:-1]
    return data.reshape(-1)


def column_rewards(dataset: Dataset, column: str, frames: Frames) -> LabelledReturns:
    """Rewards from a column (`reward_label`: -1/T a step, 0 at success, -1 at failure) and their sums to the end, which
    are not clamped: A_t = sum of rewards - V_t near the end, as in openpi forks.

    Raises LabelError where a failure ends without a penalty: with V near -1, the last frames of every failure would get
    the largest advantages of the dataset.
    """
    reward = finite(read_column(dataset, column).astype(np.float64), f"{dataset.root}: column {column!r}")
    target = np.empty_like(reward)
    for rows in frames.episodes():
        last = rows.stop - 1
        if not frames.success[last] and reward[last] > LOW + 1e-6:
            raise LabelError(
                f"{dataset.root}: column {column!r}: episode {frames.episode[last]} failed and ends with reward "
                f"{reward[last]:g}: expected -1 or less there, or the moments before a failure become its best ones; "
                "use --returns FOLDER (of `recap returns`) instead of --reward-column"
            )
        target[rows] = np.cumsum(reward[rows][::-1])[::-1]
    return LabelledReturns(target, reward, {}, "")


def export_adv_ind(labels: LabelledFrames, dataset: Dataset, path: Path) -> None:
    """Write `adv_ind` (positive, negative, none) of every frame as parquet, keyed by episode_index and frame_index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    episode, frame = dataset.keys()
    words = {indicator: word for word, indicator in _WORDS.items()}
    text = pa.array([words[int(indicator)] for indicator in labels.indicator], pa.string())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.table({"episode_index": episode, "frame_index": frame, "adv_ind": text}), temporary)
    os.replace(temporary, path)


def _values(dataset: Dataset, column: str, values: NDArray[Any]) -> LabelledValues:
    value: Floats = finite(values.astype(np.float64), f"{dataset.root}: column {column!r}")
    outside = np.flatnonzero((value < LOW - 1e-6) | (value > HIGH + 1e-6))
    if outside.size:
        raise LabelError(
            f"{dataset.root}: column {column!r}: expected values in [-1, 0] (0 is success), got {value[outside[0]]:g} "
            f"in row {outside[0]} ({outside.size} such rows)"
        )
    return LabelledValues(value, np.full(len(value), -1, np.int64), "", "")


def _import_indicators(dataset: Dataset, column: str, texts: NDArray[Any], out: Path) -> tuple[Manifest, Audit]:
    episode, frame = dataset.keys()
    bad = [row for row, text in enumerate(texts) if not isinstance(text, str) or text not in _WORDS]
    if bad:
        raise LabelError(
            f"{dataset.root}: column {column!r}: expected positive, negative or none, got {texts[bad[0]]!r} at episode "
            f"{episode[bad[0]]}, frame {frame[bad[0]]} ({len(bad)} such frames)"
        )
    known = known_outcomes(dataset)
    frames = frames_with(dataset, [success is not False for success in known])
    unknown = np.full(len(frames), np.nan)
    indicator = np.array([_WORDS[text] for text in texts], np.int8)
    labels = Labels(indicator, unknown, np.full(len(frames), "imported", dtype=object))
    rules = LabelRules(mode="imported")
    result = audit(frames, unknown, labels, rules)
    if missing := sum(success is None for success in known):
        text = f"{missing} of {len(known)} episodes have no outcome and count as successes in this table"
        result = replace(result, warnings=(*result.warnings, text))
    data: Columns = {name: unknown for name in ("return", "value", "advantage", "threshold")}
    data |= {"indicator": labels.indicator, "source": labels.source}
    return publish_advantage(dataset, out, data, result, {}, {"mode": "imported", "column": column}, {})
