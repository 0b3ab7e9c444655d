"""Several runs as one body of evidence, on runs whose true ratio is known."""

import json

import numpy as np
import pytest

from recap_model import cli
from training.experiment.pool import PoolError, compare, pool

TASKS = ("lift", "push")
ARMS = (("imitation", 1.0, 0.5, 30), ("recap", 1.0, 0.8, 30), ("recap", 2.0, 0.8, 20), ("recap-negative", 1.0, 0.3, 40))
"""(name, beta, true success rate, steps of a success)."""


def write_run(root, number, *, scenes=40, first=None, arms=ARMS, preset="study", same_noise=True):
    """A run's folder with evaluations drawn from the arms' true rates; a failure takes 60 steps."""
    first = 1000 * number if first is None else first
    rows = []
    for name, beta, rate, steps in arms:
        random = np.random.default_rng([number, 0 if same_noise else len(rows)])
        folder = f"1/{name}-{beta:g}"
        episodes = [
            {"task_name": task, "task": task, "seed": first + scene, "success": won, "steps": steps if won else 60}
            for task in TASKS
            for scene in range(scenes)
            for won in [random.random() < rate]
        ]  # fmt: skip
        (root / folder).mkdir(parents=True)
        evaluation = {"control_hz": 20.0, "episodes": episodes, "overall": {}, "tasks": {}}
        (root / folder / "evaluation.json").write_text(json.dumps(evaluation))
        rows.append({"name": name, "iteration": 1, "beta": beta, "folder": folder})
    description = {"config": {"name": preset}, "iterations": 1, "arms": rows, "stages": []}
    (root / "loop.json").write_text(json.dumps(description))
    return root


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / str(number), number) for number in range(3)]


def test_a_ratio_is_that_of_the_sums_and_its_interval_holds_it(runs):
    found = pool(runs)
    ours, theirs = found.find("recap", 1, 2.0), found.find("imitation", 1)
    result = compare(ours, theirs)
    every = [json.loads((run / "1/recap-2/evaluation.json").read_text())["episodes"] for run in runs]
    rows = [row for part in every for row in part]
    assert ours.throughput == pytest.approx(sum(r["success"] for r in rows) / sum(r["steps"] for r in rows))
    assert result.ratio[0] == pytest.approx(ours.throughput / theirs.throughput)
    true = (0.8 / (0.8 * 20 + 0.2 * 60)) / (0.5 / (0.5 * 30 + 0.5 * 60))
    for interval in (result.ratio, result.over_runs):
        assert interval[1] < true < interval[2] and interval[1] > 1
    assert len(result.per_run) == 3 and min(result.per_run) <= result.ratio[0] <= max(result.per_run)


def test_a_policy_against_itself_is_exactly_one(runs):
    policy = pool(runs).find("recap", 1)
    result = compare(policy, policy)
    assert result.ratio == result.over_runs == (1.0, 1.0, 1.0) and result.gain == (0.0, 0.0, 0.0)


def test_pairing_narrows_the_interval(tmp_path):
    def width(same_noise):
        roots = [write_run(tmp_path / f"{same_noise}{n}", n, same_noise=same_noise) for n in range(2)]
        found = pool(roots)
        _, low, high = compare(found.find("recap", 1, 2.0), found.find("imitation", 1)).ratio
        return high - low

    assert width(True) < 0.8 * width(False)


def test_only_policies_that_every_run_has_are_pooled(tmp_path):
    runs = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, arms=ARMS[:2])]
    assert [(p.name, p.beta) for p in pool(runs).policies] == [("imitation", 1.0), ("recap", 1.0)]


def test_runs_that_share_scenes_are_refused(tmp_path):
    runs = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, first=39)]
    with pytest.raises(PoolError, match=r"b: expected scenes of its own, got 1 that .*a was judged by as well"):
        pool(runs)


def test_runs_of_other_presets_and_unknown_policies_are_refused(tmp_path, runs):
    with pytest.raises(PoolError, match=r"expected runs of one preset, got \['study', 'tiny'\]"):
        pool([*runs, write_run(tmp_path / "x", 9, preset="tiny")])
    with pytest.raises(PoolError, match=r"policy: expected one of .*got recap \(1, beta 3\)"):
        pool(runs).find("recap", 1, 3.0)


def test_the_command_writes_tables_and_json(runs, tmp_path, capsys):
    out = tmp_path / "results.md"
    assert cli.main(["pool", *map(str, runs), "--beta", "2", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["runs"] == 3 and out.read_text().splitlines() == lines[:-1]
    pairs = [(row["policy"], row["beta"], row["against"]) for row in result["comparisons"]]
    assert pairs == [("recap", beta, base) for beta in (2.0, 1.0) for base in ("imitation", "recap-negative")]
    assert "3 runs, 2 tasks, 240 episodes a policy." in lines
