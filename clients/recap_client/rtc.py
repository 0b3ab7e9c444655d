"""Real-time chunking (arXiv 2506.07339), the robot's half: what a request tells of the chunk that is being executed,
and what a switch from one chunk to the next was like. The service conditions the new chunk on it."""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median_low

import numpy as np
from numpy.typing import NDArray

from recap_client.pace import LATEST
from recap_client.spec import RobotSpec

WINDOW = 8
"""Replies whose delay is remembered. One spike is forgotten after as many, and does not pin the estimate for good."""


@dataclass(frozen=True)
class Switch:
    """From one chunk to the next. delay: control steps from the new chunk's observation to its first action; seam: see
    `seam_error`, None without an old action to compare with."""

    delay: int
    seam: float | None


@dataclass(frozen=True)
class Chaining:
    """What goes with a request. previous: float32 [n, A], the rows of the current chunk from the observation's control
    step on, None = none or not wanted; delay: how many of them are expected to have run when the reply comes; horizon:
    how many of them the new chunk is held to at all, None = as many as `delay`; switched: the last switch, for the
    service's metrics; runs_out_s: seconds until the robot has no action left, so that a busy service knows who is most
    in need.
    """

    previous: NDArray[np.float32] | None = None
    delay: int = 0
    horizon: int | None = None
    switched: Switch | None = None
    runs_out_s: float | None = None


class DelayEstimate:
    """What the last replies took, in control steps of `period_s` seconds."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._took: deque[int] = deque(maxlen=WINDOW)
        self._possible: deque[int] = deque(maxlen=WINDOW)

    def add(self, took: int, latency_s: float) -> None:
        """A reply was used `took` steps after its observation and was under way for `latency_s`."""
        self._took.append(took)
        self._possible.append(max(0, math.ceil(latency_s / self._period_s - LATEST)))

    @property
    def expected(self) -> int:
        """The most that one of them took: an action that is held too firmly costs less than one that jumps."""
        return max(self._took, default=0)

    @property
    def typical(self) -> int:
        """The step from which on half of them could have been had by waiting within the step."""
        return median_low(self._possible) if self._possible else 0


def seam_error(old: NDArray[np.float32], new: NDArray[np.float32], spec: RobotSpec) -> float:
    """The jump between two actions [A] for the same step: root mean square over the dimensions of the change relative
    to the range of the spec, both clipped to it. 0 = none, 1 = every dimension from one limit to the other."""
    low = np.array([dim.low for dim in spec.action], np.float64)
    high = np.array([dim.high for dim in spec.action], np.float64)
    jump = (np.clip(new, low, high) - np.clip(old, low, high)) / (high - low)
    return float(np.sqrt(np.mean(jump**2)))
