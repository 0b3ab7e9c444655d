"""When to call the operator. The rule, on the value V of one episode (median of the last three, against noise):

- fallen: V has been at least `fall` below the best V of the episode for three observations in a row.
- stalled: for `stall` x t_max control steps the best V has not risen by 0.02, while V is below -0.1 (not nearly done).

An alarm ends when V comes back to within half of `fall` of the best (fallen), or makes a new best (stalled).
"""

from dataclasses import dataclass, field
from statistics import median

_RISE = 0.02
_NEARLY_DONE = -0.1
_HOLD = 3


@dataclass
class AlarmRule:
    """State of the rule for one episode. stall_steps: control steps without progress that count as stalled."""

    fall: float
    stall_steps: float
    reason: str | None = None
    _recent: list[float] = field(default_factory=list)
    _best: float = -2.0
    _best_step: float = 0.0
    _low: int = 0

    def update(self, step: float, value: float) -> bool:
        """Feed the value at a control step; returns True when an alarm is raised now (it was quiet before)."""
        self._recent = [*self._recent[-2:], value]
        smooth = median(self._recent)
        if smooth > self._best + _RISE:
            self._best, self._best_step = smooth, step
        before, self.reason = self.reason, self._judge(step, smooth)
        return before is None and self.reason is not None

    def _judge(self, step: float, smooth: float) -> str | None:
        drop = self._best - smooth
        self._low = self._low + 1 if drop >= self.fall else 0
        if self._low >= _HOLD or (self.reason == "fallen" and drop > self.fall / 2):
            return "fallen"
        if smooth < _NEARLY_DONE and step - self._best_step >= self.stall_steps:
            return "stalled"
        return None
