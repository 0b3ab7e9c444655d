"""A chunk goes on where the robot stands: rows for which it held are yet to come, rows that ran are not repeated."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recap_client.chunks import STRATEGIES
from recap_client.delay import Delay
from recap_client.policy import Chunk
from recap_client.robots.base import Observation
from recap_client.runtime import LoopSettings, run_episode
from recap_client.session import ServiceUnavailable
from toy_robot import ToyRobot

STEP = 2.0**-12  # exact in float32, and 60 of them in a row do not reach the goal


class Counting(ToyRobot):
    """Its state is the number of actions that have run."""

    def observe(self) -> Observation:
        seen = super().observe()
        ran = sum(action is not None for action in self.log)
        return replace(seen, state=np.array([self.x, ran], np.float32))


class Ramp:
    """Row i of a chunk is the number of the action that it is meant for. `outage`: requests of these numbers fail."""

    identity: Mapping[str, str] = {"name": "ramp", "version": "1"}
    rtc = False

    def __init__(self, rows: int, outage: range = range(0)) -> None:
        self.rows, self.outage, self.asked = rows, outage, 0

    def reset(self, episode: str, task: str, seed: int | None = None) -> None: ...

    def infer(self, observation: Observation, prompt: str, **_: object) -> Chunk:  # noqa: ARG002
        self.asked += 1
        if self.asked in self.outage:
            raise ServiceUnavailable("away")
        rows = STEP * (observation.state[1] + np.arange(self.rows, dtype=np.float32))[:, None]
        return Chunk(rows, self.asked, observation.t, 0.0)

    def outcome(self, success: bool) -> None: ...

    def clock_offset(self) -> float:
        return 0.0


def run(robot: ToyRobot, policy: Ramp, **options: object) -> list[float | None]:
    run_episode(robot, "right", 3, policy=policy, settings=LoopSettings(realtime=False, **options))  # type: ignore[arg-type]
    return robot.log


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(STRATEGIES), st.integers(1, 9), st.integers(1, 8), st.floats(0, 0.25), st.floats(0, 0.1),
)  # fmt: skip
def test_the_nth_action_that_runs_is_the_nth_that_was_meant(chunks, rows, execute, delay_s, jitter_s) -> None:
    logging.disable(logging.WARNING)  # a model without real-time chunking is said once an episode
    robot = Counting(limit=25, hz=20.0)
    log = run(robot, Ramp(rows), chunks=chunks, execute=execute, delay=Delay(delay_s, jitter_s))
    logging.disable(logging.NOTSET)
    ran = [action for action in log if action is not None]
    np.testing.assert_allclose(ran, STEP * np.arange(len(ran)), atol=1e-9)


def test_a_slow_first_reply_loses_no_row() -> None:
    """150 ms at 20 Hz: three control steps of holding, then the chunk from its first row on."""
    robot = Counting(limit=12, hz=20.0)
    log = run(robot, Ramp(8), delay=Delay(0.15))
    assert log[:3] == [None] * 3 and log[3:6] == [0.0, STEP, 2 * STEP]


@pytest.mark.parametrize("chunks", STRATEGIES)
def test_after_an_outage_it_goes_on_with_the_next_action(chunks) -> None:
    robot = Counting(limit=30, hz=1000.0)
    log = run(robot, Ramp(3, range(3, 12)), chunks=chunks, execute=3)
    ran = [action for action in log if action is not None]
    assert None in log and 0 < log.index(None) < len(ran)
    np.testing.assert_allclose(ran, STEP * np.arange(len(ran)), atol=1e-9)
