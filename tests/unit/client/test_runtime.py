"""The control loop against a real websocket service: what is executed, recorded, and how it lives through failures."""

import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from recap_client.cli import main
from recap_client.intervention import TakeoverRule
from recap_client.policy import RemotePolicy
from recap_client.record import read_rollout
from recap_client.robots.base import RobotError
from recap_client.runtime import LoopSettings, run_episode
from recap_client.value import RemoteCritic
from scripted_service import ScriptedService
from toy_robot import ToyHuman, ToyRobot

FAST = LoopSettings(realtime=False)


def test_fast_episode_executes_four_of_each_chunk_and_reports(tmp_path: Path) -> None:
    robot = ToyRobot()
    with ScriptedService(robot.spec) as service:
        policy = RemotePolicy(service.url, robot.spec, robot="r1")
        path = tmp_path / "e.mcap"
        result = run_episode(robot, "right", 3, policy=policy, recording=path, settings=FAST, episode="e3")
        policy.close()
    assert result.success and result.reason == "success" and result.steps == 10
    assert [m["seq"] for m in service.of_type("act")] == [0, 1, 2] and len(result.act_latency_s) == 3
    assert all(m["seed"] == 3 and m["episode"] == "e3" and m["robot"] == "r1" for m in service.of_type("act"))
    assert service.of_type("outcome")[0]["success"] is True and service.of_type("reset")[0]["task"] == "go right"
    rollout = read_rollout(tmp_path / "e.mcap")
    assert rollout.success and rollout.complete and rollout.steps == 10 and rollout.policy is not None
    assert rollout.clock_offset_s == pytest.approx(100.0, abs=0.5)  # the scripted service is 100 s ahead
    np.testing.assert_allclose(rollout.action, 0.1)
    np.testing.assert_array_equal(rollout.action, rollout.proposed)
    np.testing.assert_array_equal(rollout.chunk, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    np.testing.assert_allclose(rollout.state[:, 0], 0.1 * np.arange(10), atol=1e-6)
    assert not rollout.intervention.any() and np.isnan(rollout.value).all()


def test_the_log_names_the_model_of_every_chunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head names that of the start; the second of the three chunks comes from another."""
    robot = ToyRobot()
    with ScriptedService(robot.spec, script=lambda n: "model:2" if n == 1 else "") as service:
        policy = RemotePolicy(service.url, robot.spec)
        run_episode(robot, "right", 3, policy=policy, recording=tmp_path / "e.mcap", settings=FAST)
        policy.close()
    rollout = read_rollout(tmp_path / "e.mcap")
    other = {"name": "scripted", "version": "2", "hash": "2" * 64}
    assert rollout.policy is not None and rollout.policy["version"] == "1"
    assert rollout.models == dict.fromkeys([4, 5, 6, 7], other)
    assert main(["replay", str(tmp_path / "e.mcap")]) == 0
    assert "4 steps by other models: version 2" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_requests() -> None:
    def requests() -> list[object]:
        robot = ToyRobot()
        noise = lambda m: np.random.default_rng([m["seed"], m["seq"]]).uniform(0, 0.2, (8, 1)).astype(np.float32)  # noqa: E731
        with ScriptedService(robot.spec, act=noise) as service:
            policy = RemotePolicy(service.url, robot.spec)
            run_episode(robot, "right", 5, policy=policy, settings=FAST)
            policy.close()
        return [(m["seq"], m["seed"], m["observation"]["state"].tolist()) for m in service.of_type("act")]

    assert requests() == requests()


def test_rendering_only_when_something_looks() -> None:
    robot = ToyRobot()
    with ScriptedService(robot.spec) as service:
        policy = RemotePolicy(service.url, robot.spec)
        result = run_episode(robot, "right", 0, policy=policy, settings=FAST)
        policy.close()
    assert robot.looks == len(service.of_type("act")) == 3 and result.steps == 10


def test_demonstrations_need_no_service(tmp_path: Path) -> None:
    result = run_episode(ToyRobot(), "right", 0, teleoperator=ToyHuman, recording=tmp_path / "d.mcap", settings=FAST)
    rollout = read_rollout(tmp_path / "d.mcap")
    assert result.success and result.intervened == 0 and rollout.demonstration and rollout.style == "steady"
    assert np.isnan(rollout.proposed).all() and rollout.policy is None


def test_actions_are_clipped_to_the_spec_and_nan_means_hold() -> None:
    robot = ToyRobot()
    script = lambda n: "nan" if n == 1 else ""  # noqa: E731
    with ScriptedService(robot.spec, script=script, act=lambda _: np.full((8, 1), 5.0, np.float32)) as service:
        policy = RemotePolicy(service.url, robot.spec)
        result = run_episode(robot, "right", 0, policy=policy, settings=FAST)
        policy.close()
    assert robot.log == pytest.approx([0.2] * 4 + [None, 0.2]) or robot.log[4] is None
    assert result.success and result.clipped == 5 and result.starved == 1


def test_operator_takes_over_when_the_value_stands_still(tmp_path: Path) -> None:
    robot = ToyRobot()
    still = lambda _: np.zeros((8, 1), np.float32)  # noqa: E731
    with ScriptedService(robot.spec, act=still) as service, ScriptedService(robot.spec, "critic") as judge:
        policy, critic = RemotePolicy(service.url, robot.spec), RemoteCritic(judge.url, robot.spec)
        rule = TakeoverRule(1.0, window_s=8 / 50)
        result = run_episode(robot, "right", 0, policy=policy, critic=critic, teleoperator=ToyHuman, intervention=rule,
                             recording=tmp_path / "e.mcap", settings=FAST)  # fmt: skip
        policy.close(), critic.close()
    rollout = read_rollout(tmp_path / "e.mcap")
    assert result.success and result.intervened == 10 and result.steps == 18
    np.testing.assert_array_equal(np.flatnonzero(rollout.intervention), np.arange(8, 18))
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(rollout.value)), [0, 4, 8, 12, 16])
    assert [step for step, _ in result.values] == [0, 4, 8, 12, 16]
    assert len(judge.of_type("outcome")) == 1


@pytest.mark.parametrize("probability,rises,expected", [(0.0, 0.0, 0), (1.0, 0.01, 0)])
def test_no_takeover_without_watching_or_with_progress(probability: float, rises: float, expected: int) -> None:
    robot = ToyRobot()
    value = lambda m: min(0.0, -0.9 + rises * 4 * m["seq"])  # noqa: E731
    with ScriptedService(robot.spec) as service, ScriptedService(robot.spec, "critic", value=value) as judge:
        policy, critic = RemotePolicy(service.url, robot.spec), RemoteCritic(judge.url, robot.spec)
        result = run_episode(robot, "right", 0, policy=policy, critic=critic, teleoperator=ToyHuman,
                             intervention=TakeoverRule(probability, window_s=4 / 50), settings=FAST)  # fmt: skip
        policy.close(), critic.close()
    assert result.success and result.intervened == expected


def test_realtime_keeps_the_rate_and_counts_no_misses_on_a_quick_service() -> None:
    robot = ToyRobot(hz=5)
    with ScriptedService(robot.spec) as service:
        policy = RemotePolicy(service.url, robot.spec)
        result = run_episode(robot, "right", 0, policy=policy, settings=LoopSettings(realtime=True))
        policy.close()
    acts = service.of_type("act")
    assert result.success and result.starved == 0
    # consecutive requests are four control periods apart on the robot's clock: never earlier than asked
    assert all(b["t_obs"] - a["t_obs"] > 0.4 for a, b in pairwise(acts))


def test_a_slow_reply_is_bridged_by_the_reserve_and_aligned() -> None:
    robot = ToyRobot(hz=5, limit=12)
    # reply n holds rows 0.001 * (10 n + row): what is executed tells which row of which chunk
    act = lambda m: (0.001 * (10 * m["seq"] + np.arange(8, dtype=np.float32)))[:, None]  # noqa: E731
    with ScriptedService(robot.spec, script=lambda n: "late:0.24" if n == 1 else "", act=act) as service:
        policy = RemotePolicy(service.url, robot.spec)
        result = run_episode(robot, "right", 0, policy=policy, settings=LoopSettings(realtime=True))
        policy.close()
    rows = np.round(1000 * np.array(robot.log, float)).astype(int)
    assert result.starved == 0 and None not in robot.log
    assert list(rows[:5]) == [0, 1, 2, 3, 4], "step 4 lives on the old chunk"
    assert 11 in rows and 10 not in rows, "the late chunk starts at the row of its own time"


def test_after_a_stall_nothing_old_is_executed() -> None:
    class Stalling(ToyRobot):
        def act(self, action: np.ndarray):  # type: ignore[no-untyped-def]
            if len(self.log) == 5:
                time.sleep(1.2)  # a bus that hangs; longer than a reply may be late
            return super().act(action)

    robot = Stalling(hz=10, limit=12)
    act = lambda m: (0.001 * (10 * m["seq"] + np.arange(8, dtype=np.float32)))[:, None]  # noqa: E731
    with ScriptedService(robot.spec, act=act) as service:
        policy = RemotePolicy(service.url, robot.spec)
        run_episode(robot, "right", 0, policy=policy, settings=LoopSettings(realtime=True, deadline_s=0.4))
        policy.close()
    rows = [None if action is None else round(1000 * action) for action in robot.log]
    before = [row for row in rows[:6] if row is not None]
    after = [row for row in rows[6:] if row is not None]
    assert after and min(after) >= 10 * (max(before) // 10 + 1), "a chunk asked for after the stall"


def test_the_log_tells_what_was_proposed_from_what_was_done(tmp_path: Path) -> None:
    robot = ToyRobot()
    with ScriptedService(robot.spec, act=lambda _: np.full((8, 1), 5.0, np.float32)) as service:
        policy = RemotePolicy(service.url, robot.spec)
        run_episode(robot, "right", 0, policy=policy, recording=tmp_path / "e.mcap", settings=FAST)
        policy.close()
    rollout = read_rollout(tmp_path / "e.mcap")
    np.testing.assert_allclose(rollout.proposed, 5.0)
    np.testing.assert_allclose(rollout.action, 0.2)


def test_the_change_limit_is_measured_from_what_the_robot_did() -> None:
    robot = ToyRobot()
    script = lambda n: "nan" if n == 1 else ""  # noqa: E731
    with ScriptedService(robot.spec, script=script, act=lambda _: np.full((8, 1), 0.2, np.float32)) as service:
        policy = RemotePolicy(service.url, robot.spec)
        run_episode(robot, "right", 0, policy=policy, settings=LoopSettings(realtime=False, max_change=0.05))
        policy.close()
    held = robot.log.index(None)
    assert robot.log[held + 1] == pytest.approx(0.05), "after a hold (0) it starts from 0, not from the last command"


def test_ctrl_c_ends_the_episode_with_everything_recorded(tmp_path: Path) -> None:
    class Impatient(ToyRobot):
        def act(self, action: np.ndarray):  # type: ignore[no-untyped-def]
            if len(self.log) == 5:
                raise KeyboardInterrupt
            return super().act(action)

    robot = Impatient()
    result = run_episode(robot, "right", 0, teleoperator=ToyHuman, recording=tmp_path / "e.mcap", settings=FAST)
    assert robot.log[-1] is None, "it holds position"
    rollout = read_rollout(tmp_path / "e.mcap")
    assert result.reason == "operator" and result.success is None
    assert rollout.complete and rollout.reason == "operator" and rollout.steps == 5 and rollout.success is None


def test_a_broken_robot_ends_the_episode_with_everything_recorded(tmp_path: Path) -> None:
    broken = ToyRobot(break_at=3)
    with pytest.raises(RobotError, match="on fire"):
        run_episode(broken, "right", 0, teleoperator=ToyHuman, recording=tmp_path / "e.mcap", settings=FAST)
    rollout = read_rollout(tmp_path / "e.mcap")
    assert rollout.complete and rollout.reason == "error" and rollout.steps == 3


def test_refused_observations_hold_and_go_on() -> None:
    robot = ToyRobot(hz=100)
    with ScriptedService(robot.spec, script=lambda n: "error:bad_observation" if n < 2 else "") as service:
        policy = RemotePolicy(service.url, robot.spec)
        result = run_episode(robot, "right", 0, policy=policy, settings=FAST)
        assert policy.session.reconnects == 0, "a typed error keeps the connection"
        policy.close()
    assert robot.log[:3] == [None, None, pytest.approx(0.1)] and result.success and result.starved == 2
