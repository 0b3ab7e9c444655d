"""Triton dies under eight robots that move: each holds once its chunk is used up, and goes on by itself."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from recap_client.policy import RemotePolicy
from recap_client.robots.base import Observation, StepResult
from recap_client.runtime import EpisodeResult, LoopSettings, run_episode
from recap_client.session import served_spec
from recap_client.spec import RobotSpec
from service_harness import eventually
from triton_server import Triton, policy_service

ROBOTS = 8
DEADLINE_S = 1.0
CHUNK_S = 2.0  # more than any chunk of the test models lasts, and what this machine may wake a loop late
RESUME_S = 5.0


class Moving:
    """A robot in real time that moves until it is told to end; `log` has the time and the action (None = it held)."""

    def __init__(self, spec: RobotSpec, over: threading.Event) -> None:
        self.spec, self.over = spec, over
        self.log: list[tuple[float, bool]] = []
        random = np.random.default_rng(0)
        self._images = {c.name: random.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in spec.cameras}

    def prompt(self, task: str) -> str:
        return task

    def reset(self, task: str, seed: int) -> None: ...

    def observe(self) -> Observation:
        return Observation(self._images, np.zeros(len(self.spec.state), np.float32), time.monotonic())

    def act(self, action: NDArray[np.float32]) -> StepResult:
        assert np.isfinite(action).all()
        return self._step(True)

    def hold(self) -> StepResult:
        return self._step(False)

    def close(self) -> None: ...

    def moves(self, since: float, until: float = np.inf) -> list[float]:
        return [at for at, moved in self.log if moved and since <= at < until]

    def holds(self, since: float) -> int:
        return sum(not moved for at, moved in self.log if at >= since)

    def _step(self, moved: bool) -> StepResult:
        self.log.append((time.monotonic(), moved))
        return StepResult(self.over.is_set(), True)


@contextmanager
def driven(url: str) -> Iterator[tuple[list[Moving], list[EpisodeResult]]]:
    spec, over = served_spec(url), threading.Event()
    robots, results = [Moving(spec, over) for _ in range(ROBOTS)], []

    def drive(robot: Moving, number: int) -> None:
        policy = RemotePolicy(url, spec, robot=f"r{number}")
        settings = LoopSettings(deadline_s=DEADLINE_S, record_images=False)
        results.append(run_episode(robot, spec.tasks[0], number, policy=policy, settings=settings))
        assert policy.session.reconnects == 0  # the service was there all the time
        policy.close()

    threads = [threading.Thread(target=drive, args=(robot, n)) for n, robot in enumerate(robots)]
    for thread in threads:
        thread.start()
    try:
        yield robots, results
    finally:
        over.set()
        for thread in threads:
            thread.join(30)


def test_eight_moving_robots_hold_and_go_on(own_server: Triton) -> None:
    with (
        policy_service(own_server.models, own_server.url("grpc")) as service,
        driven(f"ws://127.0.0.1:{service.port}/act") as (robots, results),
    ):
        eventually(lambda: all(len(robot.moves(0.0)) >= 20 for robot in robots), 60.0)
        own_server.kill()
        dead = time.monotonic()
        still = dead + DEADLINE_S + CHUNK_S
        eventually(lambda: time.monotonic() > still and all(robot.holds(still) >= 5 for robot in robots), 60.0)
        own_server.start()
        back = time.monotonic()
        eventually(lambda: all(robot.moves(back) for robot in robots), 30.0)
        resumed = max(robot.moves(back)[0] for robot in robots) - back
        eventually(lambda: all(len(robot.moves(back)) >= 10 for robot in robots), 30.0)
    assert len(results) == ROBOTS and all(result.success for result in results)
    # holding begins when the rows that were here are used up, and nothing moves until Triton can answer again: it may
    # do so a moment before its start is noticed here
    assert not any(robot.moves(still, back - 2.0) for robot in robots)
    assert resumed <= RESUME_S
