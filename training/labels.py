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
from recap_model.manifest import Manifest, read_manifest, require_parent
from recap_model.returns import Floats
from training.columns import labelled_outcome
from training.dataset import Dataset
from training.label_files import Columns, publish_labels, read_labels
from training.label_files import LabelError as LabelError

FORMULAS = {
    "n-step": "A_t = r_t + ... + r_{t+n-1} + V_{t+n} - V_t; R_t - V_t where t + n >= T",
    "gae": "A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t; d_t = R_t - V_t at the last frame",
}


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
    """What the policy's loader needs, each [F]: returns, values, advantage, threshold float64 (NaN where the indicators
    were imported); indicator int8 (1, 0, or -1 for none); source object (str); hash: of the label folder."""

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
        "warnings": ret.failure_warnings(t_max, c_fail) + ret.unsolved_warnings(successes, tasks),
    }
    data: Columns = {name: np.concatenate(parts) for name, parts in columns.items()}
    data["success"] = np.repeat(np.array(successes, bool), lengths)
    return publish_labels(out, "returns", *dataset.keys(), data, {"dataset": dataset.hash}, parameters, metrics)


def outcomes(dataset: Dataset, *, all_successful: bool = False) -> list[bool]:
    """Every episode's outcome. Raises LabelError naming what is missing unless all are declared successful."""
    known = known_outcomes(dataset)
    if all_successful:
        failed = [episode.index for episode, success in zip(dataset.episodes, known, strict=True) if success is False]
        if failed:
            raise LabelError(
                f"{dataset.root}: --all-successful contradicts the data: {len(failed)} episodes are "
                f"recorded as failures, the first is {failed[0]}"
            )
        return [True] * len(known)
    missing = [episode.index for episode, success in zip(dataset.episodes, known, strict=True) if success is None]
    if missing:
        raise LabelError(
            f"{dataset.root}: {len(missing)} of {len(known)} episodes have no outcome (the first is "
            f"episode {missing[0]}): expected a column `success` (0/1, on frames or in meta/episodes); if "
            "these are all demonstrations that succeeded, say so with --all-successful"
        )
    return [bool(success) for success in known]


def known_outcomes(dataset: Dataset) -> list[bool | None]:
    """Outcomes as the dataset says them; where it does not, by the openpi-fork column `value_label`."""
    return [
        labelled_outcome(episode.extra.get("value_label")) if episode.success is None else episode.success
        for episode in dataset.episodes
    ]


def load_returns(folder: Path, dataset: Dataset) -> LabelledReturns:
    """Returns of every frame of `dataset`; refuses a folder made from another dataset."""
    manifest, data = read_labels(folder, "returns", dataset)
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
    return publish_labels(out, "values", episode_index, frame_index, data, parents, parameters or {}, metrics or {})


def read_values(folder: Path, dataset: Dataset) -> LabelledValues:
    """Values of every frame of `dataset`; refuses a folder made from another dataset."""
    manifest, data = read_labels(folder, "values", dataset)
    return LabelledValues(
        ret.finite(data["value"], f"{folder}: value"), data["fold"], manifest.parents.get("critic", ""), manifest.hash
    )


def make_labels(
    dataset: Dataset, returns: Path, values: Path, out: Path, rules: adv.LabelRules
) -> tuple[Manifest, Audit]:
    """Publish advantage, threshold, indicator and source of every frame at `out`, with the audit as JSON and HTML."""
    target, value = load_returns(returns, dataset), read_values(values, dataset)
    judged = read_manifest(values)
    if judged.parents.get("returns") is not None:
        require_parent(judged, "returns", target.hash, where=values)
    seen = float((value.fold < 0).mean())
    return label_frames(
        dataset,
        frames_of(dataset, returns),
        target,
        value,
        out,
        rules,
        parents={"returns": target.hash, "values": value.hash, "critic": value.critic},
        warnings=tuple(critic_warnings(judged.metrics, seen)),
        metrics={"share_of_values_from_frames_the_critic_trained_on": seen},
    )


def label_frames(
    dataset: Dataset,
    frames: adv.Frames,
    target: LabelledReturns,
    value: LabelledValues,
    out: Path,
    rules: adv.LabelRules,
    *,
    parents: dict[str, str],
    warnings: tuple[str, ...] = (),
    parameters: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> tuple[Manifest, Audit]:
    """Publish labels from returns and values in memory. warnings: reasons to distrust the values, for the audit."""
    parts = ((target.values[rows], value.values[rows], target.rewards[rows]) for rows in frames.episodes())
    advantages = np.concatenate([adv.estimate(*part, rules) for part in parts])
    labels = adv.indicators(frames, advantages, rules)
    result = audit(frames, advantages, labels, rules)
    if rules.mode == "computed":
        result = replace(result, warnings=(*result.warnings, *warnings))
    data = {
        "return": target.values,
        "value": value.values,
        "advantage": advantages,
        "threshold": labels.threshold,
        "indicator": labels.indicator,
        "source": labels.source,
    }
    return publish_advantage(dataset, out, data, result, parents,
                             {"formula": FORMULAS[rules.estimator], **asdict(rules), **(parameters or {})},
                             metrics or {})  # fmt: skip


def publish_advantage(
    dataset: Dataset,
    out: Path,
    data: Columns,
    result: Audit,
    parents: dict[str, str],
    parameters: dict[str, Any],
    metrics: dict[str, Any],
) -> tuple[Manifest, Audit]:
    """Publish the columns of an advantage folder with the audit beside them."""

    def write_audit(folder: Path) -> None:
        (folder / "audit.json").write_text(json.dumps(result.to_json(), indent=1) + "\n")
        (folder / "audit.html").write_text(render_html(result, title="Label audit"))

    metrics = {
        "positive_share": result.positive_share,
        "failed_share_of_positives": result.failed_share,
        **metrics,
        "warnings": list(result.warnings),
    }
    parents = {"dataset": dataset.hash, **parents}
    manifest = publish_labels(out, "advantage", *dataset.keys(), data, parents, parameters, metrics, write_audit)
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
    yield from judged.get("warnings", ())


def frames_of(dataset: Dataset, returns: Path) -> adv.Frames:
    """The frames as the label rules see them; outcomes as the returns took them."""
    return frames_with(
        dataset, outcomes(dataset, all_successful=bool(read_manifest(returns, "returns").parameters["all_successful"]))
    )


def frames_with(dataset: Dataset, won: list[bool]) -> adv.Frames:
    """The frames with one outcome per episode."""
    lengths = [len(episode) for episode in dataset.episodes]
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
    manifest, data = read_labels(inner if inner.is_dir() else Path(folder), "advantage", dataset)
    for name in () if manifest.parameters.get("mode") == "imported" else ("return", "value", "advantage"):
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
