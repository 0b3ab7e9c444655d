"""A cart on a rail, a robot without a simulator whose policies are easy to steer."""

from dataclasses import replace

import numpy as np

from model_factory import ROBOT
from recap_client.robots.base import Observation, StepResult

SPEC = replace(ROBOT, robot="slider", state=ROBOT.state[:1], action=ROBOT.action[:1], cameras=ROBOT.cameras[:1],
               tasks=("go",))  # fmt: skip


class Slider:
    """A cart on a rail that must reach +2; its camera shows noise."""

    spec = SPEC

    def prompt(self, task: str) -> str:
        return task

    def reset(self, task: str, seed: int) -> None:  # noqa: ARG002
        self.x, self.steps, self.random = 0.0, 0, np.random.default_rng(seed)

    def observe(self) -> Observation:
        image = self.random.integers(0, 256, (64, 64, 3), np.uint8)
        return Observation({SPEC.cameras[0].name: image}, np.array([self.x], np.float32), 0.0)

    def act(self, action: np.ndarray) -> StepResult:
        self.x, self.steps = self.x + float(np.clip(action[0], -1, 1)), self.steps + 1
        done = self.x >= 2 or self.steps >= 12
        return StepResult(done, self.x >= 2 if done else None, action)

    def hold(self) -> StepResult:
        return self.act(np.zeros(1, np.float32))

    def close(self) -> None: ...
