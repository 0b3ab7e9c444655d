"""A robot without a simulator: a point that must reach +1 on its axis. Steps are instant, scenes depend on the seed."""

import os
import signal
import time

import numpy as np

from recap_client.robots.base import Observation, RobotError, StepResult
from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim

TOY_SPEC = RobotSpec("toy", (Camera("eye", 8, 8),), (StateDim("x", "m"), StateDim("seed", "1")),
                     (ActionDim("dx", "m", -0.2, 0.2),), 50.0, ("go right",))  # fmt: skip


class ToyRobot:
    """Success at x >= 1; time-out after `limit` steps. `log` lists what was done: the action, or None for a hold."""

    def __init__(self, limit: int = 40, hz: float = 50.0, break_at: int | None = None) -> None:
        self.spec = RobotSpec(**{**TOY_SPEC.__dict__, "control_hz": hz})
        self.limit, self.break_at = limit, break_at
        self.x, self.seed = 0.0, 0
        self.log: list[float | None] = []
        self.looks = 0

    def prompt(self, task: str) -> str:
        if task not in ("right", "go right"):
            raise RobotError(f"toy: task: expected right, got {task!r}")
        return "go right"

    def reset(self, task: str, seed: int) -> None:
        self.prompt(task)
        self.x, self.seed, self.log = 0.0, seed, []

    def observe(self) -> Observation:
        self.looks += 1
        image = np.full((8, 8, 3), int(100 + 50 * self.x) % 256, np.uint8)
        return Observation({"eye": image}, np.array([self.x, self.seed], np.float32), time.monotonic())

    def act(self, action: np.ndarray) -> StepResult:
        if self.break_at is not None and len(self.log) >= self.break_at:
            raise RobotError("toy: the motor is on fire")
        self.log.append(float(action[0]))
        self.x += float(action[0])
        return self._result(np.asarray(action, np.float32))

    def hold(self) -> StepResult:
        self.log.append(None)
        return self._result(np.zeros(1, np.float32))

    def _result(self, action: np.ndarray) -> StepResult:
        success = self.x >= 1.0 - 1e-6
        done = success or len(self.log) >= self.limit
        return StepResult(done, success if done else None, action)

    def close(self) -> None:
        pass


class ToyHuman:
    style = "steady"

    def __init__(self, step: float = 0.1) -> None:
        self.step = step

    def action(self) -> np.ndarray:
        return np.array([self.step], np.float32)


class DyingRobot(ToyRobot):
    """Its process is killed in the middle of the episode with seed 2."""

    def teleoperator(self, seed: int, style: str) -> ToyHuman:  # noqa: ARG002
        return ToyHuman()

    def act(self, action: np.ndarray) -> StepResult:
        if self.seed == 2 and len(self.log) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seed == 2:
            time.sleep(0.3)  # the others are finished by then
        return super().act(action)
