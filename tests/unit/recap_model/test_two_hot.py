"""Laws of the critic's targets: two-hot and HL-Gauss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from recap_model.returns import ReturnsError, centres, expectation, hl_gauss, two_hot

values = arrays(np.float64, st.integers(1, 20), elements=st.floats(-1, 0))
bins = st.integers(2, 201)


@given(values, bins)
def test_expectation_inverts_two_hot(value, count):
    np.testing.assert_allclose(expectation(two_hot(value, count)), value, atol=1e-9)


@given(values, bins)
def test_two_hot_is_a_distribution_on_at_most_two_neighbours(value, count):
    target = two_hot(value, count)
    assert target.shape == (len(value), count) and target.min() >= 0
    np.testing.assert_allclose(target.sum(1), 1)
    for row in target:
        hot = np.flatnonzero(row)
        assert 1 <= len(hot) <= 2 and hot[-1] - hot[0] <= 1


@pytest.mark.parametrize("count", [2, 3, 201])
def test_a_bin_centre_is_one_hot(count):
    np.testing.assert_allclose(two_hot(centres(count), count), np.eye(count), atol=1e-9)


@given(st.floats(-10, 10), st.floats(0.1, 10), bins, st.floats(0, 1))
def test_any_support_works(low, width, count, share):
    value = low + share * width
    got = expectation(two_hot([value], count, low, low + width), low, low + width)
    assert got[0] == pytest.approx(value, abs=1e-8)


@given(values, st.integers(3, 201), st.floats(0.3, 4))
def test_hl_gauss_is_a_distribution_that_peaks_at_the_value(value, count, sigma):
    target = hl_gauss(value, count, sigma_bins=sigma)
    assert target.min() >= 0
    np.testing.assert_allclose(target.sum(1), 1)
    assert (np.abs(centres(count)[target.argmax(1)] - value) <= 0.5 / (count - 1) + 1e-9).all()


def test_hl_gauss_keeps_the_mean_away_from_the_ends():
    inside = np.linspace(-0.9, -0.1, 41)
    np.testing.assert_allclose(expectation(hl_gauss(inside, 201, sigma_bins=3)), inside, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.01, 0.01])
@pytest.mark.parametrize("target", [two_hot, hl_gauss])
def test_a_value_outside_the_support_or_nan_is_refused_not_clamped(target, bad):
    with pytest.raises(ReturnsError, match="values"):
        target([-0.5, bad], 201)


def test_expectation_refuses_what_is_not_a_distribution():
    with pytest.raises(ReturnsError, match="sum to 1"):
        expectation(np.full((2, 5), 0.5))
    with pytest.raises(ReturnsError, match="NaN"):
        expectation([np.nan, 1.0])
    with pytest.raises(ReturnsError, match="at least 2 bins"):
        two_hot([-0.5], 1)
