"""The parts of the demo that need no service: what counts, what the critic said when, which robot is broken."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from recap_client.robots.base import Observation, StepResult
from recap_client.robots.metaworld import metaworld_spec
from recap_client.runtime import EpisodeResult
from services.demo.children import DemoError
from services.demo.cli import DemoArgs, plan
from services.demo.drive import ScrambledRobot
from services.demo.live import sparkline
from services.demo.summary import Episode, summarise, write_json
from services.demo.values import ValueFollower, value_midway, values_at


def episode(*, success: bool, drill: bool = False, value: float = -0.5, latency_s: float = 0.004) -> Episode:
    result = EpisodeResult(
        "open the drawer", "drawer-open", 1, "e", success, "success" if success else "timeout", 21, 1, 0, 0, 0,
        (latency_s,) * 5,
    )  # fmt: skip
    return Episode(result, drill, 1.0, ((0.0, value), (20.0, value)), False)


def test_drills_count_only_for_the_critic() -> None:
    runs = [episode(success=True, value=-0.2), episode(success=True, value=-0.3)]
    drills = [episode(success=False, drill=True, value=-0.9, latency_s=9.0)]
    alone, together = summarise(runs), summarise(runs + drills)
    assert alone.value_auc is None
    assert together.value_auc == 1.0
    for field in ("episodes", "success_rate", "control_hz", "act_p50_ms", "act_p99_ms", "deadline_misses"):
        assert getattr(alone, field) == getattr(together, field)
    assert (together.episodes, together.success_rate, together.control_hz) == (2, 1.0, 20.0)
    assert together.deadline_misses == 2


def test_the_last_line_has_the_promised_keys_in_order() -> None:
    line = summarise([episode(success=True)]).line()
    assert "\n" not in line
    assert list(json.loads(line)) == [
        "episodes", "success_rate", "control_hz", "act_p50_ms", "act_p99_ms", "deadline_misses", "value_auc"
    ]  # fmt: skip
    assert json.loads(line)["value_auc"] is None


def test_nothing_driven_is_still_a_summary(tmp_path: Path) -> None:
    summary = summarise([])
    write_json(tmp_path / "demo.json", summary, [], {})
    assert json.loads((tmp_path / "demo.json").read_text())["summary"]["episodes"] == 0
    assert not math.isnan(summary.control_hz)


def test_values_between_the_critics_are_interpolated() -> None:
    assert np.allclose(values_at([(0.0, -1.0), (4.0, 0.0)], 5), [-1, -0.75, -0.5, -0.25, 0])
    assert np.isnan(values_at([], 3)).all()
    assert value_midway([], 10) is None
    assert value_midway([(0.0, -1.0), (10.0, 0.0)], 11) == pytest.approx(-0.5)
    assert value_midway([(0.0, -0.3)], 1) == pytest.approx(-0.3)


def test_follower_keeps_each_episode_and_survives_a_gap() -> None:
    follower = ValueFollower("http://127.0.0.1:9")  # nobody listens there: it keeps trying, and takes events by hand
    try:
        base = {"robot": "r", "task": "t", "alarm": False}
        follower.take({**base, "episode": "a", "type": "value", "step": 0, "value": -0.9})
        # connected again: the snapshot repeats what was seen and brings what was missed
        follower.take({**base, "episode": "a", "type": "snapshot", "step": 8, "value": -0.7,
                       "history": [[0, -0.9], [4, -0.8], [8, -0.7]]})  # fmt: skip
        follower.take({**base, "episode": "b", "type": "value", "step": 0, "value": -0.5, "alarm": True})
        follower.take({"type": "forgotten", "robot": "other"})
        assert follower.history("a") == [(0, -0.9), (4, -0.8), (8, -0.7)]
        assert follower.history("b") == [(0, -0.5)]
        assert follower.latest("r")["episode"] == "b"
        assert (follower.alarmed("a"), follower.alarmed("b")) == (False, True)
    finally:
        follower.close()


class Arm:
    """A robot that only notes what it was told to do."""

    def __init__(self) -> None:
        self.spec = metaworld_spec()
        self.done: list[NDArray[np.float32]] = []

    def reset(self, task: str, seed: int) -> None: ...
    def observe(self) -> Observation:
        return Observation({}, np.zeros(4, np.float32), 0.0)

    def act(self, action: NDArray[np.float32]) -> StepResult:
        self.done.append(action)
        return StepResult(False, None, action)

    def hold(self) -> StepResult:
        return StepResult(False)

    def prompt(self, task: str) -> str:
        return task

    def close(self) -> None: ...


def test_scrambled_motors_do_not_obey_and_repeat_with_the_seed() -> None:
    def drive(seed: int) -> NDArray[np.float32]:
        arm = Arm()
        robot = ScrambledRobot(arm)
        robot.reset("drawer-open", seed)
        for _ in range(20):
            applied = robot.act(np.ones(4, np.float32)).action
            assert applied is not None
            assert np.array_equal(applied, arm.done[-1])  # the log gets what the motors really did
        return np.array(arm.done)

    first = drive(3)
    assert not np.allclose(first, 1.0)
    assert np.array_equal(first, drive(3))
    assert not np.array_equal(first, drive(4))
    assert np.abs(first).max() <= 1


def test_missing_models_name_the_command_that_builds_them(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="`make assets` builds it"):
        plan(DemoArgs(models=tmp_path))


def test_sparkline_spans_the_value_range() -> None:
    assert sparkline([-1.0, 0.0, -2.0, 1.0]) == "▁█▁█"
