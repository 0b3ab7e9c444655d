"""Batches with a fixed share of positives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.sampling import BalancedSampler


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 24), st.floats(0.05, 0.95), st.integers(0, 30))
def test_every_batch_has_its_share_of_both_groups(positives, others, size, share, step):
    positive, other = np.arange(positives), 1000 + np.arange(others)
    rows = BalancedSampler(positive, other, size, share, seed=3)(step)
    wanted = min(max(round(share * size), 1), size - 1)
    assert len(rows) == size and (rows < 1000).sum() == wanted and np.isin(rows, np.r_[positive, other]).all()


def test_each_group_is_used_evenly_whatever_the_size_of_the_other():
    sampler = BalancedSampler(np.arange(10), 100 + np.arange(90), 20, 0.5, seed=0)
    rows = np.concatenate([sampler(step) for step in range(90)])
    assert set(np.bincount(rows[rows < 100])) == {90} and set(np.bincount(rows[rows >= 100] - 100)) == {10}


def test_a_batch_depends_on_seed_and_step_alone():
    def batch(step, seed=1):
        return BalancedSampler(np.arange(30), 100 + np.arange(50), 16, 0.4, seed)(step)

    sampler = BalancedSampler(np.arange(30), 100 + np.arange(50), 16, 0.4, 1)
    for step in (7, 0, 3):
        assert (sampler(step) == batch(step)).all()
    assert (batch(3) != batch(4)).any() and (batch(3) != batch(3, seed=2)).any()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5])
def test_a_share_of_nothing_or_everything_is_refused(share):
    with pytest.raises(ValueError, match="expected a share between 0 and 1"):
        BalancedSampler(np.arange(3), np.arange(3), 4, share, 0)


def test_labels_of_one_kind_are_refused():
    with pytest.raises(ValueError, match="expected positive and other frames in the data, got no other one"):
        BalancedSampler(np.arange(3), np.arange(0), 4, 0.5, 0)
