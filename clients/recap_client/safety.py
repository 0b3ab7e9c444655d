"""The last check before the robot moves: finite, inside the limits of the spec, not faster than allowed."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from recap_client.spec import RobotSpec, SpecError

MaxChange = NDArray[np.float32] | Mapping[str, float] | float
"""See `SafetyLimits`."""


class UnsafeAction(ValueError):
    """An action that must not be carried out (not finite, wrong shape)."""


class SafetyLimits:
    """Clips to the limits of the spec.

    max_change: largest change per control step, in the units of the spec: one number for all dimensions, an array [A],
    or a map by name, where a dimension that is not named may change freely. A name that the spec does not have, or a
    change that is not positive, raises SpecError.
    """

    def __init__(self, spec: RobotSpec, max_change: MaxChange | None = None) -> None:
        self._low = np.array([dim.low for dim in spec.action], np.float32)
        self._high = np.array([dim.high for dim in spec.action], np.float32)
        self._names = [dim.name for dim in spec.action]
        self._max_change = _per_dimension(self._names, max_change)
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


def _per_dimension(names: list[str], change: MaxChange | None) -> NDArray[np.float32] | None:
    if change is None:
        return None
    if isinstance(change, Mapping):
        unknown = sorted(set(change) - set(names))
        if unknown:
            raise SpecError(f"max_change: expected names of {names}, got {unknown}")
        change = np.array([change.get(name, np.inf) for name in names], np.float32)
    change = np.asarray(change, np.float32)
    if change.shape not in ((), (len(names),)) or not (change > 0).all():
        raise SpecError(f"max_change: expected one or {len(names)} positive numbers, got {change.tolist()}")
    return np.broadcast_to(change, (len(names),))
