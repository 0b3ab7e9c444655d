"""Per-dimension statistics and the pair normalize / unnormalize. numpy only.

Modes: `mean_std` (x-mean)/std; `min_max` to [-1, 1]; `quantile` (1 % and 99 %) to [-1, 1]; `identity` leaves numbers
alone. A dimension without spread maps to 0 and comes back as its constant whatever the model says, so that
`unnormalize(normalize(x)) == x` on the data the statistics came from.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Mode = Literal["mean_std", "min_max", "quantile", "identity"]
MODES: tuple[Mode, ...] = ("mean_std", "min_max", "quantile", "identity")
_EPS = 1e-8


@dataclass(frozen=True)
class NormStats:
    """Statistics of one vector quantity, each float64 [D]."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    min: NDArray[np.float64]
    max: NDArray[np.float64]
    q01: NDArray[np.float64]
    q99: NDArray[np.float64]

    @staticmethod
    def of(values: NDArray[Any]) -> "NormStats":
        """Statistics over the rows of `values` [N, D]. Raises ValueError on NaN, infinity or no rows."""
        if values.ndim != 2 or not len(values):
            raise ValueError(f"values: expected shape [N, D] with N >= 1, got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"values: expected finite numbers, got {(~np.isfinite(values)).sum()} NaN or infinite")
        data = values.astype(np.float64)
        q01, q99 = np.quantile(data, [0.01, 0.99], axis=0)
        return NormStats(data.mean(0), data.std(0), data.min(0), data.max(0), q01, q99)

    def affine(self, mode: Mode) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(shift, scale), each [D], with normalize(x) = (x - shift) / scale."""
        if mode == "mean_std":
            shift, scale = self.mean, self.std
        elif mode == "min_max":
            shift, scale = (self.max + self.min) / 2, (self.max - self.min) / 2
        elif mode == "quantile":
            shift, scale = (self.q99 + self.q01) / 2, (self.q99 - self.q01) / 2
        elif mode == "identity":
            shift, scale = np.zeros_like(self.mean), np.ones_like(self.mean)
        else:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        return shift, np.where(scale > _EPS, scale, 1.0)

    def gain(self, mode: Mode) -> NDArray[np.float64]:
        """[D]: what `unnormalize` multiplies by: the scale, and 0 for a dimension without spread."""
        scale = self.affine(mode)[1]
        spread = {"mean_std": self.std, "min_max": self.max - self.min, "quantile": self.q99 - self.q01}
        return np.where(spread.get(mode, scale) > _EPS, scale, 0.0)

    def to_json(self) -> dict[str, list[float]]:
        return {key: getattr(self, key).tolist() for key in ("mean", "std", "min", "max", "q01", "q99")}

    @staticmethod
    def from_json(data: dict[str, list[float]]) -> "NormStats":
        return NormStats(**{key: np.asarray(value, np.float64) for key, value in data.items()})


def normalize(x: NDArray[Any], stats: NormStats, mode: Mode) -> NDArray[np.float32]:
    """x [..., D] in physical units -> normalised float32 [..., D]."""
    shift, scale = stats.affine(mode)
    return ((x - shift) / scale).astype(np.float32)


def unnormalize(x: NDArray[Any], stats: NormStats, mode: Mode) -> NDArray[np.float32]:
    """Inverse of `normalize`."""
    return (x * stats.gain(mode) + stats.affine(mode)[0]).astype(np.float32)
