"""What a run of the loop has left so far, read from its files: evaluations, audits, critics, rollouts, times."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_client.rollout import Rollout, RolloutError, read_rollout
from recap_model.manifest import read_manifest
from recap_model.statistics import throughput_ratio

BASELINE = "imitation"
_NAMES = {
    "sft": "imitation of the demonstrations",
    "recap": "RECAP",
    "imitation": "plain imitation, same data",
    "successes": "imitation of the successful episodes",
    "filtered": "imitation of the positive frames",
    "recap-negative": "RECAP, told negative",
    "recap-none": "RECAP, told nothing",
}
_TRAINED = ("critic", "sft", "recap", "imitation", "successes", "filtered")


class ReportError(ValueError):
    """There is nothing to report on."""


@dataclass(frozen=True)
class Arm:
    """One evaluated policy. evaluation: content of its evaluation.json."""

    name: str
    iteration: int
    beta: float
    evaluation: dict[str, Any]

    @property
    def title(self) -> str:
        text = f"{self.iteration}: {_NAMES.get(self.name, self.name)}"
        return f"{text}, guidance {self.beta:g}" if self.beta != 1 else text

    @property
    def overall(self) -> dict[str, Any]:
        found: dict[str, Any] = self.evaluation["overall"]
        return found


@dataclass(frozen=True)
class Run:
    """Everything found below a run's folder; what a running loop has not made yet is empty.

    audits, critics: iteration -> audit.json / metrics of the critic's manifest. curves: checkpoint -> rows of its
    metrics.jsonl. rollouts: files of the newest iteration that has any. seconds: stage -> duration.
    """

    root: Path
    preset: str
    arms: tuple[Arm, ...] = ()
    audits: dict[int, dict[str, Any]] = field(default_factory=dict)
    critics: dict[int, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    rollouts: tuple[Path, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


def read_run(root: Path) -> Run:
    """Read what is there. Raises ReportError when the folder holds nothing of a loop."""
    description = _json(root / "loop.json")
    if description is None:
        raise ReportError(f"{root}: expected the folder of a loop (with loop.json), got none; `recap loop` makes one")
    iterations = range(int(description["iterations"]) + 1)
    arms = [
        Arm(arm["name"], int(arm["iteration"]), float(arm["beta"]), evaluation)
        for arm in description["arms"]
        if (evaluation := _json(root / arm["folder"] / "evaluation.json")) is not None
    ]
    audits = {k: found for k in iterations if (found := _json(root / f"{k}/advantage/audit.json")) is not None}
    critics = {k: read_manifest(path).metrics for k in iterations if (path := root / f"{k}/critic").is_dir()}
    checkpoints = [f"{k}/{name}" for k in iterations for name in _TRAINED]
    curves = {name: rows for name in checkpoints if (rows := _lines(root / name / "metrics.jsonl"))}
    folders = [files for k in iterations if (files := tuple(sorted((root / f"{k}/rollouts").rglob("*.mcap"))))]
    return Run(root, str(description["config"]["name"]), tuple(arms), audits, critics, curves,
               folders[-1] if folders else (), _seconds(root, description["stages"]))  # fmt: skip


def against_baseline(arm: Arm, arms: Sequence[Arm]) -> tuple[float, float, float] | None:
    """Throughput over that of plain imitation of the same iteration, with its 95 % interval; paired where the episodes
    are the same. None without such an arm, or when it never succeeds."""
    base = next((other for other in arms if other.name == BASELINE and other.iteration == arm.iteration), None)
    if base is None or base is arm or not base.overall["successes"]:
        return None
    ours, theirs = ({(row["task"], row["seed"]): row for row in a.evaluation["episodes"]} for a in (arm, base))
    paired = ours.keys() == theirs.keys()
    order = sorted(ours), sorted(theirs)
    columns = [
        [float(bool(rows[key]["success"])) if what == "success" else float(rows[key]["steps"]) for key in keys]
        for rows, keys in zip((ours, theirs), order, strict=True)
        for what in ("success", "steps")
    ]
    return throughput_ratio(*columns, paired=paired)


def known_values(rollout: Rollout) -> NDArray[np.float64]:
    """Values [T] with the gaps between the critic's judgements filled linearly; all NaN when there are none."""
    known = np.flatnonzero(np.isfinite(rollout.value))
    if not len(known):
        return np.full(rollout.steps, np.nan)
    return np.asarray(np.interp(np.arange(rollout.steps), known, rollout.value[known]), np.float64)


def read_headers(paths: Sequence[Path]) -> list[Rollout]:
    """Rollouts without their images; a damaged file is left out."""
    found = []
    for path in paths:
        try:
            found.append(read_rollout(path, images=False))
        except RolloutError:
            continue
    return found


def _seconds(root: Path, stages: Sequence[dict[str, Any]]) -> dict[str, float]:
    found = {}
    for stage in stages:
        receipt = _json(root / "stages" / f"{stage['name'].replace(' ', '-')}.json") or {}
        if receipt.get("seconds") is not None:
            found[stage["name"]] = float(receipt["seconds"])
    return found


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.is_file() else []
