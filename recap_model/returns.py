"""How far from success: rewards, returns and the critic's value support (DESIGN: RECAP mathematics). numpy only.

A step costs 1, the step that ends in success 0, the step that ends in failure C_fail; nothing is discounted.
Returns are divided per task by T_max, the length of the longest successful episode, and clamped to [-1, 0].
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

LOW, HIGH = -1.0, 0.0
"""Value support: -1 is T_max steps away from success or further (all of a failure), 0 is success."""

Floats = NDArray[np.float64]


class ReturnsError(ValueError):
    """An episode or a value cannot be turned into returns or targets."""


def finite(values: ArrayLike, what: str) -> Floats:
    """`values` as float64; raises ReturnsError when one of them is NaN or infinite."""
    array = np.asarray(values, np.float64)
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ReturnsError(f"{what}: expected finite numbers, got {bad.size} NaN or infinite, the first at {bad[0]}")
    return array


def rewards(length: int, success: bool, c_fail: float) -> Floats:
    """Rewards in control steps, float64 [length]: -1 a step, then 0 on success or -c_fail on failure."""
    if length < 1:
        raise ReturnsError(f"length: expected at least 1 frame, got {length}")
    if not (math.isfinite(c_fail) and c_fail >= 0):
        raise ReturnsError(f"c_fail: expected a finite number of steps >= 0, got {c_fail}")
    result = np.full(length, -1.0)
    result[-1] = 0.0 if success else -float(c_fail)
    return result


def normalised_rewards(length: int, success: bool, t_max: float, c_fail: float | None = None) -> Floats:
    """`rewards` in units of T_max, float64 [length]. The sum from t to the end is the return at t before its clamp."""
    if not (math.isfinite(t_max) and t_max > 0):
        raise ReturnsError(f"t_max: expected a positive number of steps, got {t_max}")
    return rewards(length, success, t_max if c_fail is None else c_fail) / t_max


def returns(length: int, success: bool, t_max: float, c_fail: float | None = None) -> Floats:
    """Normalised return at every frame, float64 [length] in [-1, 0].

    Success: -(length - 1 - t) / t_max, clamped. Failure: -1 throughout with the default c_fail = t_max; with a smaller
    c_fail (in steps) the last frames of a failure are better than -1 and compete with slow successes.
    """
    steps = normalised_rewards(length, success, t_max, c_fail)
    # from integers and one division, not a cumulative sum: exact, so that equal distances give equal returns
    remaining = np.arange(length - 1, -1, -1.0) / t_max
    return np.asarray(np.clip(steps[-1] - remaining, LOW, HIGH) + 0.0)  # + 0.0 turns -0.0 into 0.0


def t_max_per_task(
    lengths: Sequence[int], successes: Sequence[bool], tasks: Sequence[str], quantile: float = 1.0
) -> dict[str, float]:
    """T_max in control steps for every task: the `quantile` of its successful episodes' lengths (1 = the longest).

    One entry per episode in each sequence. A task without a success takes its longest episode: its returns are -1
    whatever T_max is, and the number only sets the scale that a later success is measured on.
    """
    if not 0 < quantile <= 1:
        raise ReturnsError(f"quantile: expected a number in (0, 1], got {quantile}")
    if not len(lengths) == len(successes) == len(tasks):
        raise ReturnsError(
            f"episodes: expected equally many lengths, successes and tasks, got "
            f"{len(lengths)}, {len(successes)} and {len(tasks)}"
        )
    size, won = np.asarray(lengths, np.float64), np.asarray(successes, bool)
    names = np.asarray(tasks, dtype=object)
    result = {}
    for task in sorted(set(tasks)):
        mine = names == task
        of = mine & won if (mine & won).any() else mine
        result[task] = float(np.quantile(size[of], quantile if (mine & won).any() else 1.0))
    return result


def unsolved_warnings(successes: Sequence[bool], tasks: Sequence[str]) -> list[str]:
    """Tasks without a success (one entry per episode in each sequence): nothing in their returns tells frames apart."""
    return [
        f"task {task!r}: none of {tasks.count(task)} episodes succeeds: all its returns are those of failures, T_max "
        "is its longest episode"
        for task in sorted(set(tasks))
        if not any(won for won, name in zip(successes, tasks, strict=True) if name == task)
    ]


def failure_warnings(t_max: Mapping[str, float], c_fail: float | None) -> list[str]:
    """Tasks for which a quick failure can be worth more than a slow success: C_fail below T_max."""
    if c_fail is None:
        return []
    return [
        f"task {task!r}: C_fail {c_fail:g} < T_max {steps:g}: the end of a failure outranks a slow success"
        for task, steps in sorted(t_max.items())
        if c_fail < steps
    ]


def centres(bins: int, low: float = LOW, high: float = HIGH) -> Floats:
    """The values that the bins stand for: evenly spaced, the ends included, float64 [bins]."""
    if bins < 2 or not low < high:
        raise ReturnsError(f"support: expected at least 2 bins and low < high, got {bins} bins on [{low}, {high}]")
    return np.linspace(low, high, bins, dtype=np.float64)


def two_hot(values: ArrayLike, bins: int, low: float = LOW, high: float = HIGH) -> Floats:
    """values [N] in [low, high] -> probabilities float64 [N, bins] on the two nearest bins; undone by `expectation`."""
    position = _positions(values, bins, low, high)
    lower = np.minimum(position.astype(np.int64), bins - 2)
    upper_share = position - lower
    rows = np.arange(len(position))
    result = np.zeros((len(position), bins))
    result[rows, lower] = 1.0 - upper_share
    result[rows, lower + 1] = upper_share
    return result


def hl_gauss(values: ArrayLike, bins: int, low: float = LOW, high: float = HIGH, sigma_bins: float = 0.75) -> Floats:
    """values [N] -> probabilities float64 [N, bins]: a Gaussian of `sigma_bins` bin widths, cut to the support.

    Within about three sigma of an end of the support the expectation is pulled inwards; elsewhere it is the value.
    """
    if not sigma_bins > 0:
        raise ReturnsError(f"sigma_bins: expected a positive number of bin widths, got {sigma_bins}")
    position = _positions(values, bins, low, high)
    edges = np.arange(bins + 1) - 0.5
    cumulative = _erf((edges[None, :] - position[:, None]) / (sigma_bins * math.sqrt(2.0)))
    mass = np.diff(cumulative, axis=1)
    return np.asarray(mass / mass.sum(axis=1, keepdims=True))


def expectation(probabilities: ArrayLike, low: float = LOW, high: float = HIGH) -> Floats:
    """probabilities [..., bins] -> value float64 [...]. Raises ReturnsError on NaN or rows that do not sum to 1."""
    array = finite(probabilities, "probabilities")
    total = array.sum(axis=-1)
    if not np.allclose(total, 1.0, atol=1e-3):
        raise ReturnsError(f"probabilities: expected rows that sum to 1, got {total.min():.4f} to {total.max():.4f}")
    return np.asarray(array @ centres(array.shape[-1], low, high) / total)


def _positions(values: ArrayLike, bins: int, low: float, high: float) -> Floats:
    """Values as fractional bin indices in [0, bins - 1]."""
    array = finite(values, "values").reshape(-1)
    width = (centres(bins, low, high)[-1] - low) / (bins - 1)
    outside = np.flatnonzero((array < low - 1e-6) | (array > high + 1e-6))
    if outside.size:
        raise ReturnsError(f"values: expected numbers in [{low}, {high}], got {array[outside[0]]} at {outside[0]}")
    return np.asarray(np.clip((array - low) / width, 0.0, bins - 1.0))


_erf = np.vectorize(math.erf, otypes=[np.float64])
