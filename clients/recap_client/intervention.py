"""When the operator takes over: the rule of a human who loses patience, for simulated collection."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class TakeoverRule:
    """Take over when the value has not risen by `rise` over the last `window_s` seconds.

    The operator watches with `probability`, drawn once an episode from its seed. 0.4 s are 32 simulator steps.
    """

    probability: float
    rise: float = 0.015
    window_s: float = 0.4

    def watcher(self, seed: int) -> "Watcher":
        """The operator of one episode."""
        watching = bool(np.random.default_rng([seed, 0x7A]).random() < self.probability)
        return Watcher(self, watching)


@dataclass
class Watcher:
    """Follows the values of one episode; once `taken_over`, it stays so to the end."""

    rule: TakeoverRule
    watching: bool
    taken_over: bool = False
    _values: list[tuple[float, float]] = field(default_factory=list)

    def see(self, t: float, value: float) -> bool:
        """Note the value at `t` [s, any clock that rises]; is it time to take over (or was it before)?"""
        self._values.append((t, value))
        # the newest value at least one window old; a hair of tolerance for times that are multiples of a period
        past = [v for s, v in self._values if s <= t - self.rule.window_s + 1e-6]
        if self.watching and past and value - past[-1] < self.rule.rise:
            self.taken_over = True
        return self.taken_over
