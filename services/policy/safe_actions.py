"""The last check before actions leave: finite always, and within the limits of the robot."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recap_client.spec import ActionDim
from services.common.errors import ServiceError
from services.common.settings import ActionLimits

_ROUNDING = 1e-5  # of the range; what arithmetic in float32 does to an action at its limit is no event

Unsafe = Callable[[Literal["nonfinite", "limit"]], None]


class SafeActions:
    """Checks chunks of one robot. limits: `clip` puts actions on the limit, `refuse` sends none of the chunk, `pass`
    sends them as they are, for a robot that is known to bound them itself. unsafe: called once for a chunk that has
    any, whatever becomes of it."""

    def __init__(self, action: tuple[ActionDim, ...], limits: ActionLimits, unsafe: Unsafe = lambda _: None) -> None:
        self._names = [dim.name for dim in action]
        self._low = np.array([dim.low for dim in action], np.float32)
        self._high = np.array([dim.high for dim in action], np.float32)
        with np.errstate(invalid="ignore"):
            slack = np.nan_to_num(_ROUNDING * (self._high - self._low), nan=0.0, posinf=0.0)
        self._below, self._above = self._low - slack, self._high + slack
        finite = np.finfo(np.float32)
        self._least, self._most = np.maximum(self._low, finite.min), np.minimum(self._high, finite.max)
        self._limits, self._unsafe = limits, unsafe

    def __call__(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [T, A] in physical units -> the same, safe. Raises ServiceError `internal`."""
        if ((actions >= self._least) & (actions <= self._most)).all():  # nearly always; NaN is neither
            return actions
        if not np.isfinite(actions).all():
            self._unsafe("nonfinite")
            raise ServiceError(
                "internal",
                f"the model gave NaN or infinite actions for {self._those(~np.isfinite(actions))}; not sent",
                field="actions",
                expected="finite numbers",
                got="NaN or infinity",
            )
        safe = np.clip(actions, self._low, self._high)
        beyond = (actions < self._below) | (actions > self._above)
        if beyond.any():
            self._unsafe("limit")
            if self._limits == "refuse":
                raise self._refusal(actions, beyond)
        return actions if self._limits == "pass" else safe

    def _refusal(self, actions: NDArray[np.float32], beyond: NDArray[np.bool_]) -> ServiceError:
        column = int(beyond.any(axis=0).argmax())
        first = actions[beyond[:, column], column][0]
        expected = f"{self._names[column]} from {self._low[column]:g} to {self._high[column]:g}"
        return ServiceError(
            "internal",
            f"the model gave actions beyond the robot's limits for {self._those(beyond)}; not sent",
            field="actions",
            expected=expected,
            got=f"{first:g}",
        )

    def _those(self, bad: NDArray[np.bool_]) -> str:
        return ", ".join(self._names[column] for column in np.flatnonzero(bad.any(axis=0)))
