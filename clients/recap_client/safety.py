"""The last check before the robot moves: finite, inside the limits of the spec, not faster than allowed."""

import numpy as np
from numpy.typing import NDArray

from recap_client.spec import RobotSpec


class UnsafeAction(ValueError):
    """An action that must not be carried out (not finite, wrong shape)."""


class SafetyLimits:
    """Clips to the limits of the spec. max_change: largest change per control step and dimension, [A] or one number."""

    def __init__(self, spec: RobotSpec, max_change: NDArray[np.float32] | float | None = None) -> None:
        self._low = np.array([dim.low for dim in spec.action], np.float32)
        self._high = np.array([dim.high for dim in spec.action], np.float32)
        self._names = [dim.name for dim in spec.action]
        self._max_change = None if max_change is None else np.asarray(max_change, np.float32)
        self._last: NDArray[np.float32] | None = None
        self.clipped = 0

    def reset(self) -> None:
        """Start of an episode: the first action may be anything inside the limits."""
        self._last, self.clipped = None, 0

    def applied(self, action: NDArray[np.float32] | None) -> None:
        """What the robot really did (a hold, a clip of its own): the next change is measured from it."""
        if action is not None and np.isfinite(action).all():
            self._last = np.array(action, np.float32)

    def __call__(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [A] that is safe to carry out; counts changed ones in `clipped`. Raises UnsafeAction."""
        array = np.asarray(action, np.float32)
        if array.shape != self._low.shape:
            raise UnsafeAction(f"action: expected {len(self._low)} numbers ({self._names}), got shape {array.shape}")
        if not np.isfinite(array).all():
            bad = [name for name, value in zip(self._names, array) if not np.isfinite(value)]  # noqa: B905
            raise UnsafeAction(f"action: expected finite numbers, got NaN or infinity in {bad}")
        safe = np.clip(array, self._low, self._high)
        if self._max_change is not None and self._last is not None:
            safe = np.clip(safe, self._last - self._max_change, self._last + self._max_change)
        self.clipped += int(not np.array_equal(safe, array))
        self._last = safe
        return safe
