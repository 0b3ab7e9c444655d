"""The control clock, and calls to services that do not stop it."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic, TypeVar

T = TypeVar("T")

LATEST = 0.7
"""Part of a control period after which an action is taken from the reserve rather than waited for."""


class Pace:
    """Absolute deadlines on the monotonic clock: step k starts at start + k * period, and errors do not add up.

    With realtime=False nothing is waited for and nothing can be missed.
    """

    def __init__(self, period_s: float, realtime: bool) -> None:
        self.period_s, self.realtime = period_s, realtime
        self.missed = 0
        self.lost_s = 0.0
        self._start = time.monotonic()

    def wait(self, step: int) -> None:
        """Sleep until `step` is due."""
        if self.realtime:
            time.sleep(max(0.0, self._start + step * self.period_s - time.monotonic()))

    def patience(self, step: int) -> float | None:
        """Seconds that may still be waited for an action within `step`; None = as long as it takes."""
        if not self.realtime:
            return None
        return max(0.0, self._start + (step + LATEST) * self.period_s - time.monotonic())

    def end(self, step: int) -> None:
        """The action of `step` has been sent. One that ends after its period is missed, and the clock is moved on:
        catching up with a burst of steps would be worse for the robot than the lost time."""
        late = time.monotonic() - (self._start + (step + 1) * self.period_s)
        if self.realtime and late > 0:
            self.missed += 1
            self._start += late
            self.lost_s += late

    def idle(self) -> None:
        """One control period of real time passes without an action: also when running fast, where a service that is
        gone must be given time to come back before the episode is over."""
        if not self.realtime:
            time.sleep(self.period_s)


class Caller(Generic[T]):
    """At most one call at a time, in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._pending: tuple[int, Future[T]] | None = None

    @property
    def busy(self) -> bool:
        return self._pending is not None

    def start(self, step: int, call: Callable[[], T]) -> None:
        """Begin a call for control step `step`. Only when not `busy`."""
        if self._pending is not None:
            raise RuntimeError("a call is still pending")
        self._pending = (step, self._pool.submit(call))

    def result(self, wait_s: float | None) -> tuple[int, T] | None:
        """(step, result) once, when it is there within `wait_s` (None = until it is); else None. Raises what the call
        raised."""
        if self._pending is None:
            return None
        step, future = self._pending
        try:
            value = future.result(wait_s)
        except FutureTimeout:
            # websockets and sockets raise the same class, so ask the future whether it is done
            if not future.done():
                return None
            self._pending = None
            return step, future.result()  # it ended just after the wait, or raised this itself
        except BaseException:
            if future.done():
                self._pending = None
            raise
        self._pending = None
        return step, value

    def close(self) -> None:
        """Wait for a pending call (bounded by its deadline), drop its result."""
        self._pool.shutdown(wait=True)
        self._pending = None
