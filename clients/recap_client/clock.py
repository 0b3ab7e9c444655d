"""Where the service's clock stands against this robot's, from the times of ordinary replies. Pure, no network."""

from collections import deque
from dataclasses import dataclass

ROUNDING_S = 1e-4
"""Two clocks and a duration in rounded milliseconds may disagree by this much."""


@dataclass(frozen=True)
class Offset:
    """offset_s: service clock minus robot clock [s], right within +- error_s [s] while the way takes the time it takes
    at both ends; at: robot clock when it was measured [s]."""

    offset_s: float
    error_s: float
    at: float


class ClockOffset:
    """The best of the newest replies: the one that was least time under way, as NTP's clock filter chooses (RFC 5905,
    section 10). window: replies that are kept, so that clocks that drift are followed."""

    def __init__(self, window: int = 64) -> None:
        self._samples: deque[Offset] = deque(maxlen=window)

    def add(self, sent: float, received: float, served_s: float, t_server: float) -> None:
        """Note a reply. sent, received: robot clock [s]; served_s: time it spent in the service [s]; t_server: the
        service's clock when it answered [s]. A reply whose times contradict each other says nothing."""
        way = received - sent - served_s
        if served_s >= 0 and way >= -ROUNDING_S:
            way = max(0.0, way)
            self._samples.append(Offset(t_server + way / 2 - received, way / 2, received))

    @property
    def best(self) -> Offset | None:
        """None before the first reply."""
        return min(list(self._samples), key=lambda sample: sample.error_s, default=None)

    def clear(self) -> None:
        """Another service answers, with a clock of its own."""
        self._samples.clear()
