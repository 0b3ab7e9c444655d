"""Several runs of a loop as one body of evidence: every policy against every control, with intervals.

An episode of one policy is paired with the same run's, task's and scene's episode of the other. Two intervals are
given: over episodes (runs and tasks fixed, episodes drawn within them), and over runs (runs drawn, then episodes): it
also holds what another draw of data and training noise would change, as far as a few runs can tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_model.statistics import wilson
from training.report_data import Arm, Run, read_run

Floats = NDArray[np.float64]
Interval = tuple[float, float, float]
"""value, low, high (95 %)."""

SAMPLES = 4000


class PoolError(ValueError):
    """Runs that cannot be pooled."""


@dataclass(frozen=True)
class Policy:
    """One policy over all runs. success, steps float64 [runs, tasks, scenes]."""

    title: str
    name: str
    iteration: int
    beta: float
    success: Floats
    steps: Floats

    @property
    def throughput(self) -> float:
        """Successes per control step."""
        return float(self.success.sum() / self.steps.sum())


@dataclass(frozen=True)
class Comparison:
    """Throughput of one policy over another's. ratio: interval over episodes; over_runs: the same value, interval over
    runs; per_run: each run's ratio; gain: difference in success rate."""

    ratio: Interval
    over_runs: Interval
    per_run: tuple[float, ...]
    gain: Interval


@dataclass(frozen=True)
class Pool:
    """Policies of several runs of one preset, in the order of the first run's arms."""

    preset: str
    runs: int
    tasks: tuple[str, ...]
    control_hz: float
    policies: tuple[Policy, ...]

    def find(self, name: str, iteration: int, beta: float = 1.0) -> Policy:
        """A policy by its arm's name. Raises PoolError."""
        for policy in self.policies:
            if (policy.name, policy.iteration, policy.beta) == (name, iteration, beta):
                return policy
        known = [f"{p.name} ({p.iteration}, beta {p.beta:g})" for p in self.policies]
        raise PoolError(f"policy: expected one of {known}, got {name} ({iteration}, beta {beta:g})")


def pool(roots: Sequence[Path]) -> Pool:
    """Read runs. Only policies that every run has evaluated are taken. Raises PoolError for runs of another preset, or
    that share an episode."""
    runs = [read_run(root) for root in roots]
    presets = {run.preset for run in runs}
    if len(presets) != 1:
        raise PoolError(f"runs: expected runs of one preset, got {sorted(presets)}")
    keys = [[(arm.name, arm.iteration, arm.beta) for arm in run.arms] for run in runs]
    common = [key for key in (keys[0] if keys else []) if all(key in other for other in keys)]
    if not common:
        raise PoolError("runs: expected at least one policy that every run has evaluated, got none")
    tasks, scenes = _scenes(runs, roots)
    policies = []
    for key in common:
        arms = [next(arm for arm in run.arms if (arm.name, arm.iteration, arm.beta) == key) for run in runs]
        cells = [_cells(arm, tasks, scenes[i], roots[i]) for i, arm in enumerate(arms)]
        policies.append(Policy(arms[0].title, *key, np.stack([c[0] for c in cells]), np.stack([c[1] for c in cells])))
    rate = float(runs[0].arms[0].evaluation["control_hz"])
    return Pool(presets.pop(), len(runs), tasks, rate, tuple(policies))


def compare(ours: Policy, theirs: Policy, seed: int = 0) -> Comparison:
    """`ours` against `theirs`, paired by run, task and scene."""
    rng = np.random.default_rng(seed)
    stack = np.stack([ours.success, ours.steps, theirs.success, theirs.steps])
    runs = stack.shape[1]
    within, across, gains = [], [], []
    for _ in range(SAMPLES):
        drawn = _redraw(stack, rng)
        within.append(_ratio(drawn))
        gains.append(float(drawn[0].mean() - drawn[2].mean()))
        across.append(_ratio(drawn[:, rng.integers(0, runs, runs)]))
    value = _ratio(stack)
    gain = float(ours.success.mean() - theirs.success.mean())
    per_run = tuple(_ratio(stack[:, i : i + 1]) for i in range(runs))
    return Comparison(_around(value, within), _around(value, across), per_run, _around(gain, gains))


def success_interval(policy: Policy) -> Interval:
    """Success rate with its Wilson interval over all episodes."""
    won, total = int(policy.success.sum()), policy.success.size
    return won / total, *wilson(won, total)


def _redraw(stack: Floats, rng: np.random.Generator) -> Floats:
    """[4, runs, tasks, scenes] with the scenes of every run and task drawn again, together for both policies."""
    _, runs, tasks, scenes = stack.shape
    picks = rng.integers(0, scenes, (runs, tasks, scenes))
    return np.take_along_axis(stack, np.broadcast_to(picks, stack.shape), axis=3)


def _ratio(stack: Floats) -> float:
    sums = stack.reshape(4, -1).sum(1)
    base = sums[2] / sums[3]
    return float(sums[0] / sums[1] / base) if base > 0 else float("inf")


def _around(value: float, draws: Sequence[float]) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975], method="nearest")
    return value, float(low), float(high)


def _scenes(runs: Sequence[Run], roots: Sequence[Path]) -> tuple[tuple[str, ...], list[list[int]]]:
    """(tasks, scenes of every run). Every run has its own scenes: else episodes would count twice."""
    first = runs[0].arms[0].evaluation["episodes"]
    tasks = tuple(dict.fromkeys(row["task_name"] for row in first))
    scenes = [sorted({int(row["seed"]) for row in run.arms[0].evaluation["episodes"]}) for run in runs]
    for i, own in enumerate(scenes):
        for j in range(i):
            if shared := set(own) & set(scenes[j]):
                raise PoolError(
                    f"{roots[i]}: expected scenes of its own, got {len(shared)} that {roots[j]} was judged by as well; "
                    "give every run its own --seed"
                )
        if len(own) != len(scenes[0]):
            raise PoolError(f"{roots[i]}: expected {len(scenes[0])} scenes a task as in {roots[0]}, got {len(own)}")
    return tasks, scenes


def _cells(arm: Arm, tasks: Sequence[str], scenes: Sequence[int], root: Path) -> tuple[Floats, Floats]:
    """(success, steps) [tasks, scenes]."""
    rows: dict[tuple[str, int], dict[str, Any]] = {
        (row["task_name"], int(row["seed"])): row for row in arm.evaluation["episodes"]
    }
    wanted = {(task, scene) for task in tasks for scene in scenes}
    if rows.keys() != wanted:
        raise PoolError(f"{root}: {arm.title}: expected every task and scene of the other policies, got others")
    success = np.array([[float(bool(rows[t, s]["success"])) for s in scenes] for t in tasks])
    return success, np.array([[float(rows[t, s]["steps"]) for s in scenes] for t in tasks])
