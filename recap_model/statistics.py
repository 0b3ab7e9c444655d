"""Intervals and rank statistics for evaluations. numpy only; randomness from an explicit seed."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054


def wilson(successes: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a success rate (95 % by default). (0, 1) when nothing was tried."""
    if not 0 <= successes <= total:
        raise ValueError(f"wilson: expected 0 <= successes <= total, got {successes} of {total}")
    if total == 0:
        return 0.0, 1.0
    rate, z2 = successes / total, z * z
    centre = (rate + z2 / (2 * total)) / (1 + z2 / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    # at the ends the exact bounds are 0 and 1; rounding must not move them inside
    return (0.0 if successes == 0 else max(0.0, centre - half), 1.0 if successes == total else min(1.0, centre + half))


def bootstrap_ratio(numerator: Any, denominator: Any, *, seed: int = 0, samples: int = 2000,
                    level: float = 0.95) -> tuple[float, float, float]:  # fmt: skip
    """sum(numerator) / sum(denominator) with its percentile bootstrap interval over episodes: (ratio, low, high).

    numerator, denominator: [N], e.g. successes and control steps of each episode: throughput.
    """
    top, bottom = _pair(numerator, denominator, "bootstrap_ratio")
    if len(top) == 0 or bottom.sum() <= 0:
        raise ValueError("bootstrap_ratio: expected at least one episode and a positive denominator, got none")
    picks = np.random.default_rng(seed).integers(0, len(top), (samples, len(top)))
    return (float(top.sum() / bottom.sum()), *_interval(top[picks].sum(1) / bottom[picks].sum(1), level))


def throughput_ratio(successes: Any, steps: Any, base_successes: Any, base_steps: Any, *, paired: bool, seed: int = 0,
                     samples: int = 2000, level: float = 0.95) -> tuple[float, float, float]:  # fmt: skip
    """Throughput (successes per step) of one policy over that of another, with its bootstrap interval.

    All [N] per episode. paired: row i of both is the same task and seed, and rows are drawn together.
    A baseline that never succeeds gives inf.
    """
    top, bottom = _pair(successes, steps, "throughput_ratio")
    base_top, base_bottom = _pair(base_successes, base_steps, "throughput_ratio (base)")
    if paired and len(top) != len(base_top):
        raise ValueError(f"throughput_ratio: paired: expected equal lengths, got {len(top)} and {len(base_top)}")
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(top), (samples, len(top)))
    base_picks = picks if paired else rng.integers(0, len(base_top), (samples, len(base_top)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (top.sum() / bottom.sum()) / np.float64(base_top.sum() / base_bottom.sum())
        base = base_top[base_picks].sum(1) / base_bottom[base_picks].sum(1)
        draws = (top[picks].sum(1) / bottom[picks].sum(1)) / base
    return (float(ratio), *_interval(np.nan_to_num(draws, nan=1.0, posinf=np.inf), level))


def auc(scores: Any, labels: Any) -> float:
    """Probability that a positive scores above a negative (ties count half); NaN when one class is missing."""
    values, truth = _pair(scores, np.asarray(labels, np.float64), "auc")
    positive = truth > 0.5
    count, rest = int(positive.sum()), int((~positive).sum())
    if count == 0 or rest == 0:
        return float("nan")
    return float((_ranks(values)[positive].sum() - count * (count + 1) / 2) / (count * rest))


def spearman(a: Any, b: Any) -> float:
    """Rank correlation with average ranks for ties; NaN when one of them is constant or shorter than 2."""
    x, y = _pair(a, b, "spearman")
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - (counts - 1) / 2.0)[inverse]).astype(np.float64)


def _interval(draws: NDArray[np.float64], level: float) -> tuple[float, float]:
    # method: an interpolation between infinities would be NaN
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low), float(high)


def _pair(a: Any, b: Any, what: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    if len(x) != len(y):
        raise ValueError(f"{what}: expected two arrays of one length, got {len(x)} and {len(y)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"{what}: expected finite numbers, got NaN or infinity")
    return x, y
