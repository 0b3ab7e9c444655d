"""Batches with a fixed share of positive frames, whatever their share of the data is."""

import numpy as np
from numpy.typing import NDArray

from training.loader import Sampler


class BalancedSampler:
    """Batches of `batch_size` rows of which a share is drawn from `positive`, the rest from `other`.

    Where a quarter of the frames is positive and 30 % of the clauses are dropped, a policy spends 18 % of its updates
    on the prompt that it will be served with. Each group has epochs of its own: permutations that depend on (seed,
    epoch) alone, so that a resumed run sees the same rows. what, names: what errors call the share and the two groups.
    """

    def __init__(
        self,
        positive: NDArray[np.int64],
        other: NDArray[np.int64],
        batch_size: int,
        share: float,
        seed: int,
        *,
        what: str = "positive share",
        names: tuple[str, str] = ("positive", "other"),
    ) -> None:
        if not 0.0 < share < 1.0:
            raise ValueError(f"{what}: expected a share between 0 and 1 (both excluded), got {share}")
        for name, rows in zip(names, (positive, other), strict=True):
            if not len(rows):
                raise ValueError(f"{what}: expected {names[0]} and {names[1]} frames in the data, got no {name} one")
        count = min(max(round(share * batch_size), 1), batch_size - 1)
        if batch_size < 2:
            raise ValueError(f"{what}: expected batches of at least 2 frames, got {batch_size}")
        self._positive = _endless(positive, count, seed)
        self._other = _endless(other, batch_size - count, seed + 500_009)

    def __call__(self, step: int) -> NDArray[np.int64]:
        """Rows of batch `step` [batch_size], the positive ones first."""
        return np.concatenate([self._positive(step), self._other(step)])


def _endless(rows: NDArray[np.int64], count: int, seed: int) -> Sampler:
    """A sampler of exactly `count` rows a batch, also where there are fewer rows than that."""
    return Sampler(np.tile(rows, -(-count // len(rows))), count, seed)
