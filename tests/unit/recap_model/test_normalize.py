"""normalize and unnormalize are an inverse pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from recap_model.normalize import MODES, NormStats, normalize, unnormalize

data = arrays(np.float32, st.tuples(st.integers(1, 30), st.integers(1, 6)), elements=st.floats(-1000, 1000, width=32))


@pytest.mark.parametrize("mode", MODES)
@given(values=data)
def test_round_trip(mode, values):
    stats = NormStats.of(values)
    scale = max(1.0, float(np.abs(values).max()))
    if mode == "quantile":  # an outlier in few samples is many quantile ranges away; float32 keeps 7 digits of it
        shift, spread = stats.affine(mode)
        scale = max(scale, float(np.abs((values - shift) / spread).max()) * float(spread.max()))
    np.testing.assert_allclose(unnormalize(normalize(values, stats, mode), stats, mode), values, atol=1e-5 * scale)


@given(values=data)
def test_min_max_fills_the_unit_range_and_mean_std_is_centred(values):
    stats = NormStats.of(values)
    assert np.abs(normalize(values, stats, "min_max")).max() <= 1 + 1e-5
    spread = stats.std > 1e-3
    np.testing.assert_allclose(normalize(values, stats, "mean_std").mean(0)[spread], 0, atol=1e-2)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "identity"])
def test_a_dimension_without_spread_is_zero_and_comes_back(mode):
    values = np.column_stack([np.full(10, 3.25), np.arange(10.0)])
    stats = NormStats.of(values)
    scaled = normalize(values, stats, mode)
    assert np.isfinite(scaled).all()
    np.testing.assert_allclose(scaled[:, 0], 0, atol=1e-6)
    np.testing.assert_allclose(unnormalize(scaled, stats, mode)[:, 0], 3.25)
    np.testing.assert_allclose(unnormalize(scaled + 1, stats, mode)[:, 0], 3.25)  # whatever the model says


@given(values=data)
def test_json_round_trip_is_exact(values):
    stats = NormStats.of(values)
    again = NormStats.from_json(stats.to_json())
    assert all(np.array_equal(getattr(stats, key), getattr(again, key)) for key in stats.to_json())


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros(3), np.array([[1.0, np.nan]]), np.array([[np.inf]])])
def test_no_rows_or_nan_is_an_error(bad):
    with pytest.raises(ValueError, match="values"):
        NormStats.of(bad)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode"):
        NormStats.of(np.zeros((1, 1))).affine("z-score")
