"""Label folders beside a dataset: returns/, values/, advantage/. Each holds one parquet file keyed by (episode_index,
frame_index) and a manifest that names what it was made from; a folder that does not match is refused with the hashes.

Arrays handed out are aligned with the dataset: row i is frame i in dataset order.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_model import advantage as adv
from recap_model import returns as ret
from recap_model.audit import Audit, audit, render_html
from recap_model.manifest import Manifest, publish, read_manifest, require_parent, verify, write_manifest
from recap_model.returns import Floats
from training.dataset import Dataset

FORMULA = "A_t = r_t + ... + r_{t+n-1} + V_{t+n} - V_t; R_t - V_t where t + n >= T"


class LabelError(ValueError):
    """Labels cannot be made or do not fit the dataset."""


@dataclass(frozen=True)
class LabelledReturns:
    """values float64 [F] in [-1, 0]: normalised returns; rewards float64 [F] in the same unit; t_max per task, in
    control steps; hash: of the label folder."""

    values: Floats
    rewards: Floats
    t_max: dict[str, float]
    hash: str


@dataclass(frozen=True)
class LabelledValues:
    """values float64 [F]; fold int64 [F]: held-out fold the value comes from, -1 when the critic trained on it."""

    values: Floats
    fold: NDArray[np.int64]
    critic: str
    hash: str


@dataclass(frozen=True)
class LabelledFrames:
    """What the policy's loader needs, each [F]: returns, values, advantage, threshold float64; indicator int8 (1, 0, or
    -1 for none); source object (str); hash: of the label folder."""

    returns: Floats
    values: Floats
    advantage: Floats
    threshold: Floats
    indicator: NDArray[np.int8]
    source: NDArray[np.object_]
    hash: str


def make_returns(
    dataset: Dataset,
    out: Path,
    *,
    all_successful: bool = False,
    t_max_quantile: float = 1.0,
    c_fail: float | None = None,
) -> Manifest:
    """Publish the normalised return and reward of every frame at `out`. Raises LabelError without outcomes."""
    successes = outcomes(dataset, all_successful=all_successful)
    lengths = [len(episode) for episode in dataset.episodes]
    tasks = [episode.task for episode in dataset.episodes]
    t_max = ret.t_max_per_task(lengths, successes, tasks, t_max_quantile)
    columns: dict[str, list[Floats]] = {"return": [], "reward": []}
    for length, success, task in zip(lengths, successes, tasks, strict=True):
        columns["return"].append(ret.returns(length, success, t_max[task], c_fail))
        columns["reward"].append(ret.normalised_rewards(length, success, t_max[task], c_fail))
    parameters = {
        "t_max": t_max,
        "t_max_quantile": t_max_quantile,
        "c_fail": c_fail,
        "all_successful": all_successful,
        "formula": "-(steps to the end [+ c_fail]) / t_max, clamped to [-1, 0]",
    }
    metrics = {
        "episodes": len(lengths),
        "frames": dataset.frames,
        "successes": sum(successes),
        "warnings": ret.failure_warnings(t_max, c_fail),
    }
    data: dict[str, NDArray[Any]] = {name: np.concatenate(parts) for name, parts in columns.items()}
    data["success"] = np.repeat(np.array(successes, bool), lengths)
    return _publish(out, "returns", *dataset.keys(), data, {"dataset": dataset.hash}, parameters, metrics)


def outcomes(dataset: Dataset, *, all_successful: bool = False) -> list[bool]:
    """Every episode's outcome. Raises LabelError naming what is missing unless all are declared successful."""
    known = [episode.success for episode in dataset.episodes]
    if all_successful:
        failed = [episode.index for episode in dataset.episodes if episode.success is False]
        if failed:
            raise LabelError(
                f"{dataset.root}: --all-successful contradicts the data: {len(failed)} episodes are "
                f"recorded as failures, the first is {failed[0]}"
            )
        return [True] * len(known)
    missing = [episode.index for episode in dataset.episodes if episode.success is None]
    if missing:
        raise LabelError(
            f"{dataset.root}: {len(missing)} of {len(known)} episodes have no outcome (the first is "
            f"episode {missing[0]}): expected a column `success` (0/1, on frames or in meta/episodes); if "
            "these are all demonstrations that succeeded, say so with --all-successful"
        )
    return [bool(success) for success in known]


def load_returns(folder: Path, dataset: Dataset) -> LabelledReturns:
    """Returns of every frame of `dataset`; refuses a folder made from another dataset."""
    manifest, data = _load(folder, "returns", dataset)
    return LabelledReturns(
        ret.finite(data["return"], f"{folder}: return"), data["reward"], manifest.parameters["t_max"], manifest.hash
    )


def write_values(
    out: Path,
    episode_index: NDArray[Any],
    frame_index: NDArray[Any],
    value: NDArray[Any],
    fold: NDArray[Any],
    *,
    dataset_hash: str,
    critic_hash: str,
    returns_hash: str | None = None,
    parameters: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> Manifest:
    """Publish a critic's value of every frame at `out`; all arrays [F]. NaN or values outside [-1, 0] are refused."""
    values = ret.finite(value, "value")
    if len(values) and not (values.min() >= ret.LOW - 1e-6 and values.max() <= ret.HIGH + 1e-6):
        raise LabelError(f"values: expected numbers in [-1, 0], got {values.min()} to {values.max()}")
    parents = {"dataset": dataset_hash, "critic": critic_hash} | ({"returns": returns_hash} if returns_hash else {})
    data = {"value": values, "fold": np.asarray(fold, np.int64)}
    return _publish(out, "values", episode_index, frame_index, data, parents, parameters or {}, metrics or {})


def read_values(folder: Path, dataset: Dataset) -> LabelledValues:
    """Values of every frame of `dataset`; refuses a folder made from another dataset."""
    manifest, data = _load(folder, "values", dataset)
    return LabelledValues(
        ret.finite(data["value"], f"{folder}: value"), data["fold"], manifest.parents.get("critic", ""), manifest.hash
    )


def make_labels(
    dataset: Dataset, returns: Path, values: Path, out: Path, rules: adv.LabelRules
) -> tuple[Manifest, Audit]:
    """Publish advantage, threshold, indicator and source of every frame at `out`, with the audit as JSON and HTML."""
    target, value = load_returns(returns, dataset), read_values(values, dataset)
    made_from = read_manifest(values).parents.get("returns")
    if made_from is not None:
        require_parent(read_manifest(values), "returns", target.hash, where=values)
    frames = frames_of(dataset, returns)
    advantages = np.concatenate(
        [
            adv.advantage(target.values[rows], value.values[rows], target.rewards[rows], rules.n)
            for rows in frames.episodes()
        ]
    )
    labels = adv.indicators(frames, advantages, rules)
    result = audit(frames, advantages, labels, rules)
    seen = float((value.fold < 0).mean())
    if rules.mode == "computed":
        judged = read_manifest(values).metrics
        result = replace(result, warnings=(*result.warnings, *critic_warnings(judged, seen)))
    data = {
        "return": target.values,
        "value": value.values,
        "advantage": advantages,
        "threshold": labels.threshold,
        "indicator": labels.indicator,
        "source": labels.source,
    }
    parents = {"dataset": dataset.hash, "returns": target.hash, "values": value.hash, "critic": value.critic}
    metrics = {
        "positive_share": result.positive_share,
        "failed_share_of_positives": result.failed_share,
        "share_of_values_from_frames_the_critic_trained_on": seen,
        "warnings": list(result.warnings),
    }

    def write_audit(folder: Path) -> None:
        (folder / "audit.json").write_text(json.dumps(result.to_json(), indent=1) + "\n")
        (folder / "audit.html").write_text(render_html(result, title="Label audit"))

    manifest = _publish(
        out, "advantage", *dataset.keys(), data, parents, {"formula": FORMULA, **asdict(rules)}, metrics, write_audit
    )
    return manifest, result


def critic_warnings(judged: Mapping[str, Any], seen: float) -> Iterator[str]:
    """Reasons to distrust the critic behind the values. judged: its validation report; seen: share of values from a
    critic that trained on the episode."""
    if seen > 0:
        yield f"{seen:.0%} of the values come from a critic that trained on the episode: train it with --folds 2"
    if (area := judged.get("auc_50")) is not None and area < 0.6:
        yield f"the critic hardly tells success from failure half-way (AUC {area:.2f} on episodes it had not seen)"
    if (drop := judged.get("failure_drop")) is not None and drop > 0:
        yield f"the critic's value rises ({drop:+.2f}) on failed episodes that it had not seen"


def frames_of(dataset: Dataset, returns: Path) -> adv.Frames:
    """The frames as the label rules see them; outcomes as the returns took them."""
    lengths = [len(episode) for episode in dataset.episodes]
    won = outcomes(dataset, all_successful=bool(read_manifest(returns, "returns").parameters["all_successful"]))
    return adv.Frames(
        episode=dataset.keys()[0],
        task=np.repeat(np.array([e.task for e in dataset.episodes], dtype=object), lengths),
        intervention=np.concatenate([e.intervention for e in dataset.episodes]),
        demonstration=np.repeat(np.array([e.demonstration for e in dataset.episodes], bool), lengths),
        success=np.repeat(np.array(won, bool), lengths),
    )


def load_labels(folder: Path, dataset: Dataset) -> LabelledFrames:
    """Labels of every frame of `dataset`. folder: of `recap label`, or the one that holds its advantage/ folder."""
    inner = Path(folder) / "advantage"
    manifest, data = _load(inner if inner.is_dir() else Path(folder), "advantage", dataset)
    for name in ("return", "value", "advantage"):
        ret.finite(data[name], f"{folder}: {name}")
    return LabelledFrames(
        data["return"],
        data["value"],
        data["advantage"],
        data["threshold"],
        data["indicator"].astype(np.int8),
        data["source"],
        manifest.hash,
    )


def _publish(
    out: Path,
    kind: str,
    episode: NDArray[Any],
    frame: NDArray[Any],
    data: dict[str, NDArray[Any]],
    parents: dict[str, str],
    parameters: dict[str, Any],
    metrics: dict[str, Any],
    extra: Any = None,
) -> Manifest:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "episode_index": np.asarray(episode, np.int64),
            "frame_index": np.asarray(frame, np.int64),
            **{name: pa.array(values) for name, values in data.items()},
        }
    )
    with publish(out) as folder:
        pq.write_table(table, folder / f"{kind}.parquet")
        if extra is not None:
            extra(folder)
        return write_manifest(folder, kind, parents=parents, parameters=parameters, metrics=metrics)


def _load(folder: Path, kind: str, dataset: Dataset) -> tuple[Manifest, dict[str, NDArray[Any]]]:
    """Manifest and columns in dataset order, after every check: whole, of this kind and dataset, every frame once."""
    import pyarrow.parquet as pq

    folder = Path(folder)
    manifest = verify(folder, kind)
    require_parent(manifest, "dataset", dataset.hash, where=folder)
    table = pq.read_table(folder / f"{kind}.parquet")
    data = {name: np.asarray(table.column(name).to_numpy(zero_copy_only=False)) for name in table.column_names}
    episode, frame = dataset.keys()
    order = np.lexsort((data["frame_index"], data["episode_index"]))
    wanted = np.lexsort((frame, episode))
    if len(order) != len(wanted) or not (
        np.array_equal(data["episode_index"][order], episode[wanted])
        and np.array_equal(data["frame_index"][order], frame[wanted])
    ):
        raise LabelError(
            f"{folder}: expected one row for each of the {len(wanted)} frames of {dataset.root}, got "
            f"{len(order)} rows that do not match them"
        )
    place = np.empty(len(wanted), np.int64)
    place[wanted] = order
    return manifest, {name: values[place] for name, values in data.items()}
