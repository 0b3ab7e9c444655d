"""`recap collect` and `recap evaluate`, run for real: simulated demonstrations, a served policy over a socket."""

import json
from pathlib import Path

import numpy as np
import pytest

from recap_client.record import read_rollout
from recap_client.robots.metaworld import metaworld_spec
from recap_client.runtime import EpisodeResult
from scripted_service import ScriptedService
from toy_robot import TOY_SPEC
from training.evaluate import EvaluationError, collect, evaluate, percentiles, statistics


def result(task: str, seed: int, success: bool | None, steps: int, **more: object) -> EpisodeResult:
    return EpisodeResult(task, task, seed, f"{task}-{seed}", success, "x", steps, 0, 0, 0, 0, **more)  # type: ignore[arg-type]


def test_statistics_by_hand() -> None:
    results = [result("a", 0, True, 20, act_latency_s=(0.01, 0.03), values=((0, -0.2),)),
               result("b", 0, False, 60, values=((0, -0.8),)), result("a", 1, True, 40)]  # fmt: skip
    report = statistics(results, control_hz=20)
    overall = report["overall"]
    assert overall["successes"] == 2 and overall["success_rate"] == pytest.approx(2 / 3)
    assert overall["throughput_per_1000_steps"] == pytest.approx(2 / 120 * 1000)
    assert overall["throughput_per_minute"] == pytest.approx(2 / (120 / 20 / 60))
    low, high = overall["throughput_per_minute_95"]
    assert low <= overall["throughput_per_minute"] <= high
    assert overall["mean_steps_success"] == 30 and overall["mean_steps"] == 40
    assert overall["latency_s"]["n"] == 2 and overall["latency_s"]["p50"] == pytest.approx(0.02)
    assert overall["value_auc"] == 1.0
    assert report["tasks"]["b"]["success_rate"] == 0 and report["tasks"]["b"]["mean_steps_success"] is None
    assert [row["task_name"] for row in report["episodes"]] == ["a", "b", "a"]
    json.dumps(report, allow_nan=False)


def test_statistics_of_nothing() -> None:
    json.dumps(statistics([], 20.0), allow_nan=False)
    assert percentiles([])["p50"] is None


def test_collect_demonstrations_records_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--demonstrations", "--out", str(tmp_path), "--tasks", "faucet-open", "--episodes-per-task", "2",
               "--workers", "1", "--style", "clean"]  # fmt: skip
    assert collect(command) == 0
    files = sorted(tmp_path.glob("*.mcap"))
    stamps = [path.stat().st_mtime_ns for path in files]
    assert [path.name for path in files] == ["faucet-open-000000.mcap", "faucet-open-000001.mcap"]
    rollout = read_rollout(files[0])
    assert rollout.success and rollout.demonstration and rollout.style == "clean" and rollout.task == "turn the faucet"
    assert rollout.images["front"].shape == (rollout.steps, 64, 64, 3) and rollout.spec == metaworld_spec()
    assert collect(command) == 0
    assert [path.stat().st_mtime_ns for path in files] == stamps
    assert "faucet-open" in capsys.readouterr().out


def test_recorded_actions_replay_to_the_same_states(tmp_path: Path) -> None:
    from recap_client.cli import main

    collect(["--demonstrations", "--out", str(tmp_path), "--tasks", "drawer-open", "--episodes-per-task", "1"])
    assert main(["replay", str(tmp_path / "drawer-open-000000.mcap"), "--robot", "metaworld", "--fast"]) == 0


def test_evaluate_a_served_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedService(TOY_SPEC) as service:
        command = ["--out", str(tmp_path), "--robot", "toy_robot:ToyRobot", "--tasks", "right", "--policy-url",
                   service.url, "--episodes-per-task", "3", "--workers", "1", "--record", "all"]  # fmt: skip
        assert evaluate(command) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["policy"]["name"] == "scripted" and report["overall"]["success_rate"] == 1
    assert report["overall"]["latency_s"]["n"] == 9 and [row["seed"] for row in report["episodes"]] == [
        100_000, 100_001, 100_002,
    ]  # fmt: skip
    assert report["overall"]["throughput_per_minute"] == pytest.approx(3 / (30 / 50 / 60))
    assert len(list((tmp_path / "rollouts").glob("*.mcap"))) == 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 3


def test_collect_with_takeovers(tmp_path: Path) -> None:
    still = lambda m: np.zeros((8, 4), np.float32)  # noqa: ARG005, E731
    spec = metaworld_spec()
    with ScriptedService(spec, act=still) as policy, ScriptedService(spec, "critic") as critic:
        collect(["--out", str(tmp_path), "--tasks", "button-press-topdown", "--episodes-per-task", "1", "--policy-url",
                 policy.url, "--value-url", critic.url, "--intervene", "1"])  # fmt: skip
    rollout = read_rollout(next(tmp_path.glob("*.mcap")))
    assert rollout.success and rollout.seed == 50_000 and not rollout.demonstration
    assert rollout.intervention[8:].all() and not rollout.intervention[:8].any()
    assert np.isnan(rollout.proposed[8:]).all() and np.nanmax(rollout.value) == -0.5


@pytest.mark.parametrize("argv,message", [
    (["--demonstrations", "--policy-url", "ws://x"], "either --demonstrations or --policy-url"),
    ([], "either --demonstrations or --policy-url"),
    (["--policy-url", "ws://x", "--intervene", "0.5"], "expected --value-url"),
])  # fmt: skip
def test_contradictions_are_named(tmp_path: Path, argv: list[str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        collect([*argv, "--out", str(tmp_path)])
    with pytest.raises(EvaluationError, match="expected --policy-url"):
        evaluate(["--out", str(tmp_path)])
