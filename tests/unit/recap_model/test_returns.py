"""Laws of rewards and returns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recap_model.returns import (
    ReturnsError,
    failure_warnings,
    normalised_rewards,
    returns,
    rewards,
    t_max_per_task,
)

lengths = st.integers(1, 400)
steps = st.floats(1, 1000)


@given(lengths, st.booleans(), steps, st.none() | st.floats(0, 2000))
def test_the_sum_of_rewards_to_the_end_is_the_return_before_its_clamp(length, success, t_max, c_fail):
    reward = normalised_rewards(length, success, t_max, c_fail)
    to_the_end = np.cumsum(reward[::-1])[::-1]
    np.testing.assert_allclose(returns(length, success, t_max, c_fail), np.clip(to_the_end, -1, 0), atol=1e-9)


@given(lengths, st.booleans(), steps, st.none() | st.floats(0, 2000))
def test_returns_are_in_range_and_never_fall_within_an_episode(length, success, t_max, c_fail):
    value = returns(length, success, t_max, c_fail)
    assert value.shape == (length,) and value.dtype == np.float64
    assert value.min() >= -1 and value.max() <= 0
    assert (np.diff(value) >= 0).all()


@given(lengths, steps)
def test_the_last_frame_of_a_success_is_worth_nothing_less_than_zero(length, t_max):
    value = returns(length, True, t_max)
    assert value[-1] == 0 and not np.signbit(value[-1])


@given(lengths, steps)
def test_a_failure_is_minus_one_throughout_by_default(length, t_max):
    assert (returns(length, False, t_max) == -1).all()


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200))
def test_a_longer_way_to_success_starts_lower(a, b, extra):
    t_max = max(a, b) + extra
    first, second = returns(a, True, t_max)[0], returns(b, True, t_max)[0]
    assert (first < second) == (a > b)


def test_the_longest_success_starts_just_above_minus_one():
    assert returns(50, True, 50)[0] == -49 / 50


def test_a_finite_failure_cost_ranks_the_end_of_a_failure_by_it():
    value = returns(10, False, 100.0, c_fail=20.0)
    assert value[-1] == pytest.approx(-0.2) and value[0] == pytest.approx(-0.29)
    assert failure_warnings({"a": 100.0}, 20.0) and not failure_warnings({"a": 100.0}, 100.0)
    assert not failure_warnings({"a": 100.0}, None)


def test_rewards_by_hand():
    assert rewards(4, True, 9).tolist() == [-1, -1, -1, 0]
    assert rewards(4, False, 9).tolist() == [-1, -1, -1, -9]
    assert rewards(1, False, 9).tolist() == [-9]


@pytest.mark.parametrize("bad", [0, -3])
def test_an_episode_without_frames_is_refused(bad):
    with pytest.raises(ReturnsError, match="length"):
        rewards(bad, True, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_an_unusable_scale_or_cost_is_refused(bad):
    with pytest.raises(ReturnsError, match="t_max"):
        returns(3, True, bad)
    with pytest.raises(ReturnsError, match="c_fail"):
        rewards(3, False, bad)


class TestTMax:
    def test_it_is_the_longest_success_of_the_task(self):
        got = t_max_per_task([10, 30, 99, 5], [True, True, False, True], ["a", "a", "a", "b"])
        assert got == {"a": 30.0, "b": 5.0}

    def test_a_task_without_success_takes_its_longest_episode(self):
        assert t_max_per_task([10, 30], [False, False], ["a", "a"], quantile=0.1) == {"a": 30.0}

    @given(
        st.lists(st.tuples(lengths, st.booleans(), st.sampled_from("abc")), min_size=1, max_size=30),
        st.floats(0.01, 1),
        st.randoms(use_true_random=False),
    )
    def test_the_order_of_episodes_and_other_tasks_do_not_matter(self, episodes, quantile, random):
        expected = t_max_per_task(*zip(*episodes, strict=True), quantile)
        shuffled = random.sample(episodes, len(episodes))
        assert t_max_per_task(*zip(*shuffled, strict=True), quantile) == expected
        only_a = [episode for episode in episodes if episode[2] == "a"]
        if only_a:
            assert t_max_per_task(*zip(*only_a, strict=True), quantile)["a"] == expected["a"]

    @given(st.lists(lengths, min_size=1, max_size=20), st.floats(0.01, 1), st.floats(0.01, 1))
    def test_a_higher_quantile_is_never_shorter(self, sizes, one, other):
        low, high = sorted([one, other])
        arguments = (sizes, [True] * len(sizes), ["a"] * len(sizes))
        assert t_max_per_task(*arguments, low)["a"] <= t_max_per_task(*arguments, high)["a"] + 1e-9

    def test_columns_of_different_lengths_are_refused(self):
        with pytest.raises(ReturnsError, match="equally many"):
            t_max_per_task([1, 2], [True], ["a", "a"])
        with pytest.raises(ReturnsError, match="quantile"):
            t_max_per_task([1], [True], ["a"], 0.0)
