"""The simulated arm and its scripted human: scenes depend on the seed alone, frames fit the spec, styles differ."""

import builtins
import os
import subprocess
import sys

import numpy as np
import pytest

from recap_client.robots.base import RobotError
from recap_client.robots.expert import STYLES, ScriptedExpert
from recap_client.robots.metaworld import TASKS, MetaWorldRobot, metaworld_spec
from recap_client.robots.registry import open_robot, teleoperator_of


@pytest.fixture(scope="module")
def robot() -> MetaWorldRobot:
    return MetaWorldRobot()


def drive(robot: MetaWorldRobot, task: str, seed: int, style: str) -> tuple[bool, int]:
    robot.reset(task, seed)
    human = ScriptedExpert(robot, seed, style)
    for step in range(1, robot.episode_limit + 1):
        result = robot.act(human.action())
        if result.done:
            return bool(result.success), step
        assert result.success is None
    raise AssertionError("the episode limit was not kept")


def test_the_scene_is_a_function_of_task_and_seed(robot: MetaWorldRobot) -> None:
    robot.reset("drawer-open", 3)
    first = robot.observe()
    drive(robot, "drawer-open", 5, "bad")  # leaves the drawer somewhere
    robot.reset("door-open", 3)
    robot.observe()
    robot.reset("open the drawer", 3)  # by prompt
    again, fresh = robot.observe(), MetaWorldRobot()
    fresh.reset("drawer-open", 3)
    for other in (again, fresh.observe()):
        np.testing.assert_array_equal(first.state, other.state)
        for name in first.images:
            np.testing.assert_array_equal(first.images[name], other.images[name])
    robot.reset("drawer-open", 4)
    assert (robot.observe().images["top"] != first.images["top"]).any()


def test_observations_fit_the_spec(robot: MetaWorldRobot) -> None:
    robot.reset("door-open", 0)
    seen = robot.observe()
    spec = metaworld_spec()
    assert robot.spec == spec and spec.control_hz == 20 and set(seen.images) == {"front", "top"}
    assert seen.state.dtype == np.float32 and seen.state.shape == (4,)
    for camera in spec.cameras:
        frame = seen.images[camera.name]
        assert frame.dtype == np.uint8 and frame.shape == (camera.height, camera.width, 3) and frame.std() > 10


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_clean_expert_succeeds(robot: MetaWorldRobot, task: str) -> None:
    runs = [drive(robot, task, seed, "clean") for seed in range(4)]
    assert sum(ok for ok, _ in runs) >= 3 and max(steps for ok, steps in runs if ok) < 40


def test_mixed_demonstrations_differ_in_quality(robot: MetaWorldRobot) -> None:
    runs = {style: [drive(robot, "door-open", seed, style) for seed in range(6)] for style in ("clean", "slow", "bad")}
    length = {style: np.mean([n for ok, n in rows if ok] or [99]) for style, rows in runs.items()}
    assert length["slow"] > 1.4 * length["clean"]
    assert sum(ok for ok, _ in runs["bad"]) < sum(ok for ok, _ in runs["clean"])


def test_styles_are_drawn_by_their_shares_from_the_seed(robot: MetaWorldRobot) -> None:
    robot.reset("drawer-open", 0)
    drawn = [ScriptedExpert(robot, seed).style for seed in range(600)]
    assert drawn[:20] == [ScriptedExpert(robot, seed).style for seed in range(20)]
    for name, style in STYLES.items():
        assert drawn.count(name) / 600 == pytest.approx(style.share, abs=0.06)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_leaving_out_unseen_parts_changes_no_pixel(
    robot: MetaWorldRobot, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    robot.reset(task, 11)
    human = ScriptedExpert(robot, 11, "detour")
    for step in range(40):
        if step % 8 == 0:
            quick = robot.observe().images
            with monkeypatch.context() as patch:
                patch.setattr(MetaWorldRobot, "_unseen", lambda *_: [])
                whole = robot.observe().images
            for name in whole:
                np.testing.assert_array_equal(quick[name], whole[name])
        if robot.act(human.action()).done:
            break


def test_holding_keeps_the_hand_in_place(robot: MetaWorldRobot) -> None:
    robot.reset("drawer-open", 0)
    for _ in range(5):
        robot.act(np.array([0.5, 0.0, 0.5, 1.0], np.float32))
    for _ in range(4):
        robot.hold()  # the hand follows its target with some delay
    before = robot.full_observation[:3].copy()
    for _ in range(5):
        result = robot.hold()
    np.testing.assert_array_equal(result.action, np.array([0, 0, 0, 1], np.float32))
    np.testing.assert_allclose(robot.full_observation[:3], before, atol=2e-3)


def test_control_rate_sets_the_repetition() -> None:
    moved = {}
    for hz, steps in ((20, 5), (80, 20)):
        robot = MetaWorldRobot(control_hz=hz)
        robot.reset("drawer-open", 1)
        for _ in range(steps):
            robot.act(np.array([0.3, 0.2, 0.1, 0.0], np.float32))
        moved[hz] = robot.full_observation[:3].copy()
    np.testing.assert_array_equal(moved[20], moved[80])


def test_the_episode_limit_ends_without_success() -> None:
    robot = MetaWorldRobot(episode_limit=3)
    robot.reset("drawer-open", 0)
    results = [robot.hold() for _ in range(3)]
    assert [(r.done, r.success) for r in results] == [(False, None), (False, None), (True, False)]


def test_mistakes_are_named(robot: MetaWorldRobot, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RobotError, match=r"expected one of .*door-open.*got 'fly'"):
        robot.reset("fly", 0)
    with pytest.raises(RobotError, match="divisor of 80, got 30"):
        MetaWorldRobot(control_hz=30)
    with pytest.raises(RobotError, match=r"call reset\(task, seed\) first"):
        MetaWorldRobot().observe()
    robot.reset("door-open", 0)
    with pytest.raises(RobotError, match="4 finite numbers"):
        robot.act(np.full(4, np.nan, np.float32))
    with pytest.raises(RobotError, match="style: expected one of"):
        ScriptedExpert(robot, 0, "genius")
    with pytest.raises(RobotError, match=r"expected one of .* got 'r2d2'"):
        open_robot("r2d2")
    with pytest.raises(RobotError, match="teleoperator"):
        teleoperator_of(type("Bare", (), {"spec": metaworld_spec()})(), 0, "clean")
    real = builtins.__import__

    def without_metaworld(name: str, *rest: object) -> object:
        if name.startswith("metaworld"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_metaworld)
    monkeypatch.delitem(sys.modules, "metaworld.env_dict", raising=False)
    with pytest.raises(RobotError, match=r"pip install 'recap-client\[sim\]'"):
        MetaWorldRobot()


def test_rendering_works_when_mujoco_was_imported_before() -> None:
    code = (
        "import mujoco\nfrom recap_client.robots.metaworld import MetaWorldRobot\n"
        "robot = MetaWorldRobot()\nrobot.reset('door-open', 0)\nassert robot.observe().images['front'].std() > 10"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
