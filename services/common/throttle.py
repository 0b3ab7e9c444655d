"""A log line for what strangers can cause: once in a while, with the number of those that were not written."""

import time
from collections.abc import Callable, Hashable


class Throttle:
    """Lets one event of a kind through in `every_s`. kinds must come from a fixed set: each is remembered."""

    def __init__(self, every_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = every_s, clock
        self._last: dict[Hashable, float] = {}
        self._held: dict[Hashable, int] = {}

    def passes(self, kind: Hashable) -> dict[str, int] | None:
        """None when this event is held back; else what its line has to say besides: `suppressed`, how many of its kind
        were held back since the last line, where there were any."""
        now = self._clock()
        if now - self._last.get(kind, -1e9) < self._every_s:
            self._held[kind] = self._held.get(kind, 0) + 1
            return None
        self._last[kind] = now
        held = self._held.pop(kind, 0)
        return {"suppressed": held} if held else {}
