"""The control loop is not held up by its services, however slow they are."""

import time
from typing import Any

import numpy as np

from recap_client.policy import RemotePolicy
from recap_client.runtime import LoopSettings, run_episode
from recap_client.value import RemoteCritic
from scripted_service import ScriptedService
from toy_robot import ToyRobot


def test_it_commands_the_robot_for_as_long_as_a_reply_takes() -> None:
    """After their first replies both services answer only when the robot was commanded twenty times more: a loop that
    waits for either would stand still, and the reply would never come."""
    robot = ToyRobot(limit=60, hz=100.0)
    commanded: dict[str, int] = {}

    def after_twenty_commands(who: str, message: dict[str, Any]) -> None:
        if message["seq"] == 1:
            wanted, end = len(robot.log) + 20, time.monotonic() + 30
            while len(robot.log) < wanted and time.monotonic() < end:
                time.sleep(0.005)
            commanded[who] = len(robot.log) - wanted + 20

    def act(message: dict[str, Any]) -> np.ndarray:
        after_twenty_commands("policy", message)
        return np.full((8, 1), 0.01, np.float32)

    def value(message: dict[str, Any]) -> float:
        after_twenty_commands("critic", message)
        return -0.5

    with ScriptedService(robot.spec, act=act) as service, ScriptedService(robot.spec, "critic", value=value) as judge:
        policy, critic = RemotePolicy(service.url, robot.spec), RemoteCritic(judge.url, robot.spec)
        settings = LoopSettings(deadline_s=60.0)
        result = run_episode(robot, "right", 0, policy=policy, critic=critic, settings=settings)
        policy.close()
        critic.close()
    assert commanded["policy"] >= 20 and commanded["critic"] >= 20
    assert result.steps == 60 and result.starved >= 10 and None in robot.log, "what was left of the chunk, then held"
