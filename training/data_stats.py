"""Statistics of a dataset's state and action by dimension, as normalisation uses them, and what looks wrong in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_client.spec import ActionDim, StateDim
from recap_model.normalize import NormStats
from training.dataset import Dataset

CONSTANT = 1e-8
"""A spread up to this is none: normalisation serves such a dimension as its constant."""
NARROW = 4.0
"""min..max wider than so many times q01..q99 earns a warning."""
FIGURES = ("mean", "std", "min", "max", "q01", "q99")


@dataclass(frozen=True)
class DimensionStats:
    """One dimension over all frames. figures: mean, std, min, max, q01, q99 in `unit`."""

    quantity: str
    name: str
    unit: str
    figures: dict[str, float]


@dataclass(frozen=True)
class DatasetStats:
    """Of one dataset. rows: state, then action, in the order of the spec."""

    dataset: str
    hash: str
    episodes: int
    frames: int
    rows: tuple[DimensionStats, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """{"state" | "action": {"names", "units", "mean", ... "q99": one number a dimension}, ...}."""
        result: dict[str, Any] = {"dataset": self.dataset, "hash": self.hash, "episodes": self.episodes}
        result["frames"] = self.frames
        for quantity in ("state", "action"):
            mine = [row for row in self.rows if row.quantity == quantity]
            result[quantity] = {"names": [row.name for row in mine], "units": [row.unit for row in mine]} | {
                figure: [row.figures[figure] for row in mine] for figure in FIGURES
            }
        return result | {"warnings": list(self.warnings)}


def dataset_stats(data: Dataset) -> DatasetStats:
    """Statistics over all frames of all episodes: what a policy trained on `data` from scratch normalises with."""
    rows = (
        *_rows("state", data.spec.state, np.concatenate([episode.state for episode in data.episodes])),
        *_rows("action", data.spec.action, np.concatenate([episode.action for episode in data.episodes])),
    )
    warnings = tuple(text for row in rows for text in _warnings(row))
    return DatasetStats(str(data.root), data.hash, len(data.episodes), data.frames, rows, warnings)


def _rows(quantity: str, dims: Sequence[StateDim | ActionDim], values: NDArray[np.float32]) -> Iterator[DimensionStats]:
    figures = NormStats.of(values).to_json()
    for number, dim in enumerate(dims):
        yield DimensionStats(quantity, dim.name, dim.unit, {key: figures[key][number] for key in FIGURES})


def _warnings(row: DimensionStats) -> Iterator[str]:
    figures, where = row.figures, f"{row.quantity}[{row.name}]"
    full, inner = figures["max"] - figures["min"], figures["q99"] - figures["q01"]
    if full <= CONSTANT:
        yield (
            f"{where} is constant at {figures['mean']:g}: a model learns nothing of it"
            + (", and its policy always commands this value" if row.quantity == "action" else "")
        )  # fmt: skip
    elif inner <= CONSTANT:
        yield (
            f"{where} is {figures['q01']:g} in at least 98 % of the frames but ranges from {figures['min']:g} to "
            f"{figures['max']:g}: normalisation by quantiles takes it for a constant"
        )
    elif full > NARROW * inner:
        yield (
            f"{where}: q01..q99 is {figures['q01']:g} to {figures['q99']:g}, min..max {figures['min']:g} to "
            f"{figures['max']:g}, {full / inner:.0f} times as wide: outliers, which min/max normalisation gives nearly "
            "the whole range"
        )
