"""How much one caller may ask for: requests and bytes a second (token buckets), requests and sessions at once.

Everything here is used on the event loop only, and costs about a microsecond a request.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from services.common.errors import ServiceError
from services.common.settings import Quota

Clock = Callable[[], float]

_MOST_IDLE = 1024  # callers whose buckets are kept although they are away


class TokenBucket:
    """Lets `amount`s through at `rate` a second on average, and `burst` at once after a pause.

    In any time T at most burst + rate * T goes through; an amount above the burst goes through when the bucket is full,
    and is paid back before the next. clock: monotonic seconds, so that a set clock opens and closes nothing.
    """

    def __init__(self, rate: float, burst: float, clock: Clock = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._level, self._at = burst, clock()

    def take(self, amount: float = 1.0) -> float:
        """0.0 and the amount is taken; or the seconds until it could be, and nothing is taken."""
        lacking = min(amount, self._burst) - self._filled()
        if lacking > 0:
            return lacking / self._rate
        self._level -= amount
        return 0.0

    @property
    def full(self) -> bool:
        return self._filled() >= self._burst

    def _filled(self) -> float:
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        return self._level


class OverQuota(ServiceError):
    """`rate_limited`. reason: the label of the metric: rate, bytes, in_flight or sessions."""

    def __init__(self, reason: str, message: str, retry_after_s: float) -> None:
        super().__init__("rate_limited", message, retry_after_s=retry_after_s)
        self.reason = reason


@dataclass(eq=False)
class Usage:
    """What one caller uses now, over all its connections."""

    name: str
    quota: Quota
    clock: Clock = time.monotonic
    in_flight: int = 0
    sessions: int = 0
    _requests: TokenBucket | None = field(default=None, init=False)
    _bytes: TokenBucket | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        quota = self.quota
        if quota.rate is not None:
            self._requests = TokenBucket(quota.rate, quota.burst or max(quota.rate, 1.0), self.clock)
        if quota.bytes_per_s is not None:
            self._bytes = TokenBucket(quota.bytes_per_s, quota.bytes_per_s, self.clock)

    def spend(self, requests: int, size: int) -> None:
        """Count requests of `size` bytes together. Raises OverQuota with the seconds to wait."""
        if requests and self._requests is not None and (wait := self._requests.take(requests)):
            raise self._over("rate", f"{self.quota.rate:g} requests a second", wait)
        if size and self._bytes is not None and (wait := self._bytes.take(size)):
            raise self._over("bytes", f"{self.quota.bytes_per_s:g} bytes a second", wait)

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request that is being answered. Raises OverQuota."""
        if self.quota.in_flight is not None and self.in_flight >= self.quota.in_flight:
            raise self._over("in_flight", f"{self.quota.in_flight} requests at once", 0.1)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @contextmanager
    def session(self) -> Iterator[None]:
        """A connection, or a robot of a protocol without connections. Raises OverQuota."""
        if self.quota.sessions is not None and self.sessions >= self.quota.sessions:
            raise self._over("sessions", f"{self.quota.sessions} sessions at once", 5.0)
        self.sessions += 1
        try:
            yield
        finally:
            self.sessions -= 1

    @property
    def idle(self) -> bool:
        """Nothing is open and nothing is owed: forgetting it gives nothing away."""
        buckets = (self._requests, self._bytes)
        return not self.in_flight and not self.sessions and all(b is None or b.full for b in buckets)

    def _over(self, reason: str, allowed: str, wait: float) -> OverQuota:
        return OverQuota(reason, f"{self.name}: expected at most {allowed}; ask again in {wait:.2f} s", wait)


class Usages:
    """The usage of every caller by name; of those that are away and owe nothing, about a thousand are kept."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, Usage] = {}
        self._sweep_at = _MOST_IDLE

    def __len__(self) -> int:
        return len(self._known)

    def of(self, name: str, quota: Quota) -> Usage:
        """The usage under a name; a quota other than before starts it afresh, what is open then counts no more."""
        usage = self._known.get(name)
        if usage is None or usage.quota != quota:
            if len(self._known) >= self._sweep_at:
                self._known = {key: known for key, known in self._known.items() if not known.idle}
                self._sweep_at = len(self._known) + _MOST_IDLE  # many that owe something must not mean a sweep each
            usage = self._known[name] = Usage(name, quota, self._clock)
        return usage
