"""Laws of the statistics: known values, invariances, and coverage of what an interval promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recap_model.statistics import auc, bootstrap_ratio, spearman, throughput_ratio, wilson

FLOATS = hnp.arrays(np.float64, st.integers(2, 30), elements=st.integers(-5, 5).map(float))


def test_wilson_known_values() -> None:
    assert wilson(93, 100) == pytest.approx((0.863, 0.966), abs=5e-4)
    assert wilson(24, 24) == pytest.approx((0.862, 1.0), abs=5e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 of 4"):
        wilson(5, 4)


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_holds_the_rate_and_mirrors(successes: int, total: int) -> None:
    successes = min(successes, total)
    low, high = wilson(successes, total)
    assert 0 <= low <= successes / total <= high <= 1
    mirrored = wilson(total - successes, total)
    assert mirrored == pytest.approx((1 - high, 1 - low))


@given(FLOATS, st.data())
@settings(deadline=None)
def test_auc_is_the_probability_of_a_right_order(scores: np.ndarray, data: st.DataObject) -> None:
    labels = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    if labels.all() or not labels.any():
        assert np.isnan(auc(scores, labels))
        return
    pairs = scores[labels][:, None] - scores[~labels][None, :]
    assert auc(scores, labels) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert auc(-scores, labels) == pytest.approx(1 - auc(scores, labels))


@given(FLOATS)
@settings(deadline=None)
def test_spearman_sees_only_the_order(values: np.ndarray) -> None:
    if np.ptp(values) == 0:
        assert np.isnan(spearman(values, values))
        return
    assert spearman(values, np.exp(values)) == pytest.approx(1)
    assert spearman(values, -(values**3)) == pytest.approx(-1)


def test_spearman_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 8, (2, 60))
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_bootstrap_ratio_is_reproducible_and_covers() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        success, steps = rng.random(60) < 0.7, rng.integers(20, 63, 60)
        ratio, low, high = bootstrap_ratio(success, steps, seed=trial, samples=400)
        assert low <= ratio <= high
        hits += low <= 0.7 / 41 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert bootstrap_ratio([1, 0, 1], [5, 9, 6], seed=3) == bootstrap_ratio([1, 0, 1], [5, 9, 6], seed=3)
    with pytest.raises(ValueError, match="at least one episode"):
        bootstrap_ratio([], [])


def test_throughput_ratio() -> None:
    success, steps = np.array([1, 1, 0, 1.0]), np.array([20, 30, 62, 25.0])
    assert throughput_ratio(success, steps, success, steps, paired=True) == (1.0, 1.0, 1.0)
    ratio, low, high = throughput_ratio(success, steps, success, 2 * steps, paired=True)
    assert ratio == low == high == pytest.approx(2)
    ratio, low, high = throughput_ratio(success, steps, success, steps, paired=False)
    assert ratio == 1 and low < 1 < high
    assert throughput_ratio(success, steps, 0 * success, steps, paired=False)[0] == np.inf
    with pytest.raises(ValueError, match="equal lengths"):
        throughput_ratio(success, steps, success[:3], steps[:3], paired=True)
    with pytest.raises(ValueError, match="NaN"):
        bootstrap_ratio([np.nan], [1.0])
