"""A slow network without waiting for it: replies of a simulated episode are held back by control steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from recap_client.pace import Caller

T = TypeVar("T")


@dataclass(frozen=True)
class Delay:
    """Seconds from an observation to its reply: uniform in delay_s +/- jitter_s, at least 0."""

    delay_s: float
    jitter_s: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.delay_s < math.inf and 0 <= self.jitter_s < math.inf):
            raise ValueError(f"delay_s, jitter_s: expected seconds >= 0, got {self.delay_s} and {self.jitter_s}")

    def draw(self, random: np.random.Generator) -> float:
        return max(0.0, self.delay_s + float(random.uniform(-self.jitter_s, self.jitter_s)))


class LateCaller(Generic[T]):
    """A `Caller` for lock-step simulation. Its clock is the number of the control step, so an episode does not depend
    on how fast the machine is: a reply is there when its delay of robot time has passed since its observation.

    period_s: of a control step; delayed(result, lag_s): the result with the delay written into it.
    """

    def __init__(self, caller: Caller[T], delay: Delay, period_s: float, random: np.random.Generator,
                 delayed: Callable[[T, float], T]) -> None:  # fmt: skip
        self._caller, self._delay, self._period_s, self._random = caller, delay, period_s, random
        self._delayed = delayed
        self._lag = 0.0
        self._held: tuple[int, T] | None = None

    @property
    def busy(self) -> bool:
        return self._caller.busy or self._held is not None

    def start(self, step: int, call: Callable[[], T]) -> None:
        """As `Caller.start`; draws this call's delay."""
        self._lag = self._delay.draw(self._random)
        self._caller.start(step, call)

    def result(self, step: int, within: float) -> tuple[int, T] | None:
        """(step of the call, result) once, when it is there before the part `within` (0 to 1) of control step `step`
        has passed; else None. Raises at once what the call raised."""
        if self._held is None:
            self._held = self._caller.result(None)
        if self._held is None or (step + within - self._held[0]) * self._period_s < self._lag - 1e-9:
            return None
        (at, value), self._held = self._held, None
        return at, self._delayed(value, self._lag)

    def close(self) -> None:
        self._caller.close()
        self._held = None
