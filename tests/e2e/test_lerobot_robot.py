"""Robots that LeRobot drives: its classes and factory, the real service, the real loop; only the body is simulated."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recap_client.robots.registry as registry
from recap_client import verdict
from recap_client.fleet import FleetSettings, Job, run_fleet
from recap_client.policy import RemotePolicy
from recap_client.robots.base import RobotError
from recap_client.rollout import read_rollout
from recap_client.runtime import LoopSettings
from recap_client.spec import SpecError
from repository_factory import TASKS
from scripted_service import ScriptedService
from service_harness import eventually, policy_server

FAST = LoopSettings(realtime=False)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The plug-in, installed as far as LeRobot can tell, with LeRobot's calibration folder elsewhere."""
    import lerobot_robot_simulated

    folder = tmp_path_factory.mktemp("site")
    lerobot_robot_simulated.install(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for device in ("robots.robot", "teleoperators.teleoperator"):
            patch.setattr(f"lerobot.{device}.HF_LEROBOT_CALIBRATION", folder)
        yield lerobot_robot_simulated


@pytest.fixture
def options(plugin: Any, tmp_path: Path) -> dict[str, object]:
    (tmp_path / "spec.json").write_text(json.dumps({"kind": "policy", "robot": plugin.SPEC.to_json()}))
    return {"spec": str(tmp_path / "spec.json"), "config": {"id": "one"}, "episode_s": 0.4}


def test_episodes_of_a_lerobot_arm_with_the_real_service(
    plugin: Any, options: dict[str, object], tmp_path: Path
) -> None:
    models = plugin.build_models(tmp_path / "models")
    with policy_server(models) as served:
        settings = FleetSettings("lerobot:simulated_arm", options, served.url(), record=tmp_path, loop=FAST)
        (result,) = run_fleet([Job(TASKS[0], 4)], settings)
        asked = [float(call["state"][0, 1]) for call in served.engine.calls if call["images"].max() == 7]
    arm = plugin.SimulatedArm.instances[-1]
    assert (result.steps, result.success, result.reason, arm.is_connected) == (20, None, "timeout", False)
    assert arm.connections == 1 and len(arm.sent) == 20
    rollout = read_rollout(tmp_path / f"{TASKS[0].replace(' ', '-')}-000004.mcap")
    np.testing.assert_allclose(rollout.state[0], [0, -plugin.SAG, 0])
    assert asked[0] == pytest.approx(-0.25) and len(asked) == 5, "the service saw the arm's own observations"
    proposed = np.array([[sent[name] for name in plugin.JOINTS] for sent in arm.sent])
    np.testing.assert_allclose(proposed, np.clip(rollout.proposed, -20, 20), rtol=1e-6)
    # what is recorded as done is what LeRobot says was sent, its own limit included
    np.testing.assert_allclose(rollout.action[0], np.clip(proposed[0], -5, 5), rtol=1e-6)


def test_the_operator_ends_an_episode_of_an_arm_that_cannot_tell(
    plugin: Any, options: dict[str, object], tmp_path: Path
) -> None:
    with ScriptedService(plugin.SPEC, act=lambda _: np.ones((8, 3), np.float32)) as service:
        arm = {**options, "episode_s": 3600}
        settings = FleetSettings("lerobot:simulated_arm", arm, service.url, record=tmp_path, loop=LoopSettings())
        speaking = threading.Thread(
            target=lambda: (eventually(lambda: len(service.of_type("act")) > 1), verdict.say("success"))
        )
        speaking.start()
        (result,) = run_fleet([Job(TASKS[0], 4)], settings)
        speaking.join(20)
        assert [message["success"] for message in service.of_type("outcome")] == [True]
    assert (result.success, result.reason) == (True, "success")
    assert plugin.SimulatedArm.instances[-1].sent[-1]["pan.pos"] <= 1.0, "at the end it holds where it is"


def test_holding_takes_the_position_once(plugin: Any, options: dict[str, object]) -> None:
    robot = registry.open_robot("lerobot:simulated_arm", options)
    robot.reset(TASKS[0], 0)
    robot.act(np.array([4.0, 4.0, 4.0], np.float32))
    for _ in range(5):
        robot.observe()
        held = robot.hold()
    arm = plugin.SimulatedArm.instances[-1]
    assert arm.sent[1:] == [{"pan.pos": 4.0, "lift.pos": 3.75, "grip.pos": 4.0}] * 5, "it sags once, not five times"
    np.testing.assert_allclose(held.action, [4.0, 3.75, 4.0])
    robot.act(np.array([4.0, 5.0, 4.0], np.float32))
    robot.observe()
    robot.hold()
    assert arm.sent[-1]["lift.pos"] == 4.75
    robot.close()
    robot.close()


def test_the_leader_demonstrates_by_name_not_by_order(plugin: Any, options: dict[str, object], tmp_path: Path) -> None:
    teleop = {"type": "simulated_leader", "goal": 1.0}
    settings = FleetSettings("lerobot:simulated_arm", {**options, "teleop": teleop}, record=tmp_path, loop=FAST)
    (result,) = run_fleet([Job(TASKS[0], 0)], settings)
    arm = plugin.SimulatedArm.instances[-1]
    assert arm.sent[0] == {"pan.pos": 1.0, "lift.pos": 2.0, "grip.pos": 3.0}
    assert result.style == "human" and result.steps == 20
    with pytest.raises(RobotError, match="no teleoperator: give one in the options"):
        registry.open_robot("lerobot:simulated_arm", options).teleoperator(0, "mixed")
    wrong = registry.open_robot("lerobot:simulated_arm", {**options, "teleop": {**teleop, "joints": ["pan.pos", "x"]}})
    with pytest.raises(
        SpecError, match=r"teleoperator: expected \['pan.pos', 'lift.pos', 'grip.pos'\], got .* unknown"
    ):
        wrong.teleoperator(0, "mixed")


@pytest.mark.parametrize("change,error,message", [
    ({"config": {"joints": ["pan.pos", "grip.pos"]}}, SpecError,
     r"state: expected \['pan.pos', 'lift.pos', 'grip.pos'\] \(spec\), got \['pan.pos', 'grip.pos'\]: no \['lift"),
    ({"config": {"size": 8}}, SpecError, r"expected Camera\(.*height=16, .*got Camera\(.*height=8"),
    ({"config": {"calibrated": False}}, RobotError, "expected a calibrated device; run lerobot-calibrate"),
    ({"config": {"prot": 1}}, RobotError, "simulated_arm: cannot be made from {'prot': 1}"),
    ({"spec": "nowhere.json"}, SpecError, "nowhere.json: expected the JSON of a robot spec: .*No such file"),
    ({"spec": None}, SpecError, "expected in the options either spec .a file., or control_hz and limits"),
    ({"specs": 1}, RobotError, "options: expected those of LeRobotRobot, got .*'specs'"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused_and_nothing_is_connected(
    plugin: Any, options: dict[str, object], change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        registry.open_robot("lerobot:simulated_arm", {**options, **change})
    assert not plugin.SimulatedArm.instances[-1].is_connected


def test_a_type_that_is_not_there_lists_those_that_are(plugin: Any, options: dict[str, object]) -> None:  # noqa: ARG001
    with pytest.raises(RobotError, match=r"expected one of \[.*'simulated_arm'.*'so101_follower'.*\], got 'so1001'"):
        registry.open_robot("lerobot:so1001", options)


def test_a_spec_can_be_derived_and_a_service_for_another_order_is_refused(plugin: Any) -> None:
    derived = {"control_hz": 50, "limits": [-20, 20], "units": dict.fromkeys(plugin.JOINTS, "deg"), "tasks": [TASKS[0]]}
    robot = registry.open_robot("lerobot:simulated_arm", derived)
    assert robot.spec == plugin.SPEC
    with pytest.raises(RobotError, match=r"task: expected one of .*, got 'dance'"):
        robot.prompt("dance")
    turned = registry.open_robot("lerobot:simulated_arm", {**derived, "config": {"joints": list(plugin.JOINTS[::-1])}})
    with (
        ScriptedService(robot.spec) as service,
        pytest.raises(SpecError, match=r"spec\.state differs: expected .*'grip"),
    ):
        RemotePolicy(service.url, turned.spec)
    robot.close()
    turned.close()
