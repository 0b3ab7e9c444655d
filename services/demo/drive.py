"""The robot of the demo, in a process of its own: it drives the simulated arm at control rate over the websocket.

The process sends an `EpisodeResult` for every episode, or a `Failure` and ends. SIGTERM ends the episode in hand with
everything recorded.
"""

import gc
import multiprocessing
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recap_client.policy import RemotePolicy
from recap_client.robots.base import Observation, Robot, StepResult
from recap_client.robots.metaworld import MetaWorldRobot
from recap_client.runtime import EpisodeResult, LoopSettings, run_episode
from recap_client.session import ServiceError

ROBOT = "metaworld-0"
_RESETS = 5  # a service that is being restarted gets this many seconds
_HELD = 6  # control steps that a broken motor keeps a random direction


@dataclass(frozen=True)
class Job:
    """One episode to drive. drill: the motors are scrambled, so that the critic has a failure to recognise."""

    task: str
    seed: int
    drill: bool = False

    @property
    def episode(self) -> str:
        return f"{'drill-' if self.drill else ''}{self.task}-{self.seed}"


@dataclass(frozen=True)
class Failure:
    """Why the robot process gave up, in one line."""

    message: str


@dataclass
class ScrambledRobot:
    """Wraps a robot: whatever it is told, its motors follow a random direction that changes now and then."""

    robot: Robot
    seed: int = 0

    def __post_init__(self) -> None:
        self.spec = self.robot.spec
        self._generator = np.random.default_rng(self.seed)
        self._low = np.array([dim.low for dim in self.spec.action], np.float32)
        self._high = np.array([dim.high for dim in self.spec.action], np.float32)
        self._steps, self._direction = 0, self._low

    def reset(self, task: str, seed: int) -> None:
        self._generator = np.random.default_rng([self.seed, seed])
        self._steps = 0
        self.robot.reset(task, seed)

    def act(self, action: NDArray[np.float32]) -> StepResult:  # noqa: ARG002 - not heeded: that is the fault
        if self._steps % _HELD == 0:
            self._direction = self._generator.uniform(self._low, self._high).astype(np.float32)
        self._steps += 1
        return self.robot.act(self._direction)

    def hold(self) -> StepResult:
        return self.act(self._low)

    def observe(self) -> Observation:
        return self.robot.observe()

    def prompt(self, task: str) -> str:
        return self.robot.prompt(task)

    def close(self) -> None:
        self.robot.close()


def start(url: str, jobs: Sequence[Job], rollouts: Path, *, execute: int) -> tuple[BaseProcess, Connection]:
    """Start the robot process; its messages come out of the connection, which ends (EOFError) with the process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (url, tuple(jobs), rollouts, execute, sender)
    process = context.Process(target=_drive, args=arguments, name="recap-demo-robot", daemon=True)
    process.start()
    sender.close()
    return process, receiver


def _drive(url: str, jobs: Sequence[Job], rollouts: Path, execute: int, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the parent too, which sends SIGTERM
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        robot = MetaWorldRobot()
        policy = RemotePolicy(url, robot.spec, robot=ROBOT)
        _warm_up(robot, {job.task for job in jobs})
        gc.freeze()  # a full collection over the simulator's objects would cost a control step
        settings = LoopSettings(execute=execute)
        for job in jobs:
            result = _episode(ScrambledRobot(robot) if job.drill else robot, policy, job, rollouts, settings)
            sender.send(result)
            if result.reason == "operator":
                break
        policy.close()
        robot.close()
    except KeyboardInterrupt:
        pass
    except Exception as error:  # whatever it is, the other side must hear of it
        sender.send(Failure(f"{type(error).__name__}: {error}"))
    finally:
        sender.close()


def _episode(robot: Robot, policy: RemotePolicy, job: Job, rollouts: Path, settings: LoopSettings) -> EpisodeResult:
    """One episode; a policy service that is away when it starts gets some seconds to come back."""
    path = rollouts / f"{job.episode}.mcap"
    for attempt in range(_RESETS):
        try:
            return run_episode(
                robot, job.task, job.seed, policy=policy, recording=path, settings=settings, episode=job.episode
            )
        except ServiceError:
            if attempt == _RESETS - 1:
                raise
            time.sleep(1.0)
    raise AssertionError("unreachable")


def _warm_up(robot: MetaWorldRobot, tasks: set[str]) -> None:
    """Build every scene and its renderer before the control clock runs: a cold one takes longer than a control step."""
    for task in sorted(tasks):
        robot.reset(task, 0)
        robot.observe()


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: a second signal must not break off the closing of the log
    raise KeyboardInterrupt
