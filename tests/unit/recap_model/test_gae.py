"""Laws of the generalised advantage estimate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recap_model.advantage import AdvantageError, Frames, LabelRules, advantage, estimate, gae, indicators
from recap_model.audit import audit
from recap_model.returns import normalised_rewards, returns

lengths = st.integers(1, 120)
shares = st.floats(0, 1)
costs = st.none() | st.floats(0, 500)


def episode(length, success, t_max=60.0, seed=0, c_fail=None):
    value = np.random.default_rng(seed).uniform(-1, 0, length)
    return returns(length, success, t_max, c_fail), value, normalised_rewards(length, success, t_max, c_fail)


@given(lengths, st.booleans(), st.integers(0, 99))
def test_gamma_and_lambda_of_one_compare_with_the_whole_rest_before_the_clamp(length, success, seed):
    target, value, reward = episode(length, success, seed=seed)
    unclamped = np.cumsum(reward[::-1])[::-1]
    np.testing.assert_allclose(gae(target, value, reward, 1.0, 1.0), unclamped - value, atol=1e-9)
    if success and length <= 60:  # nothing was clamped
        np.testing.assert_allclose(gae(target, value, reward, 1.0, 1.0), target - value, atol=1e-9)


@given(lengths, st.booleans(), st.integers(0, 99))
def test_a_lambda_of_zero_is_the_one_step_advantage(length, success, seed):
    arrays = episode(length, success, seed=seed)
    np.testing.assert_allclose(gae(*arrays, 1.0, 0.0), advantage(*arrays, 1), atol=1e-12)


@given(lengths, st.booleans(), shares, shares, st.integers(0, 99))
def test_it_is_the_discounted_sum_of_one_step_errors(length, success, gamma, lam, seed):
    target, value, reward = episode(length, success, seed=seed)
    errors = np.r_[reward[:-1] + gamma * value[1:] - value[:-1], target[-1] - value[-1]]
    expected = [sum((gamma * lam) ** k * errors[t + k] for k in range(length - t)) for t in range(length)]
    np.testing.assert_allclose(gae(target, value, reward, gamma, lam), expected, atol=1e-9)


@given(lengths, shares, st.integers(0, 99))
def test_it_is_the_weighted_mean_of_all_look_aheads(length, lam, seed):
    """(1 - lam) sum of lam^(n-1) A^(n), the rest of the weight on the whole episode, where nothing is clamped."""
    arrays = episode(length, True, t_max=200.0, seed=seed)
    weights = [(1 - lam) * lam ** (n - 1) for n in range(1, length)]
    parts = [w * advantage(*arrays, n) for n, w in enumerate(weights, 1)]
    expected = np.sum(parts, axis=0) + (1 - sum(weights)) * advantage(*arrays, None)
    np.testing.assert_allclose(gae(*arrays, 1.0, lam), expected, atol=1e-9)


@given(lengths, shares)
def test_a_perfect_critic_of_a_success_has_no_advantage_anywhere(length, lam):
    target = returns(length, True, 150.0)
    np.testing.assert_allclose(gae(target, target, normalised_rewards(length, True, 150.0), 1.0, lam), 0, atol=1e-9)


@given(lengths, shares, shares, costs, st.integers(0, 99))
def test_the_last_frame_is_measured_by_what_the_critic_learned_for_it(length, gamma, lam, c_fail, seed):
    """So a failure never ends above 0 where the critic sees it, and by default not at all."""
    target, value, reward = episode(length, False, seed=seed, c_fail=c_fail)
    last = gae(target, value, reward, gamma, lam)[-1]
    assert last == target[-1] - value[-1]
    assert gae(target, target, reward, gamma, lam)[-1] == 0
    if c_fail is None:
        assert last <= 0


def test_a_discount_that_the_critic_does_not_have_pays_for_standing_still():
    """Mid-failure, V = -1: gamma = 1 sees lost time, gamma = .99 (nahidalam/pi06's default) a gain of 1 % a step."""
    target, reward = returns(280, False, 200.0), normalised_rewards(280, False, 200.0)
    assert (gae(target, target, reward, 1.0, 0.95)[:-1] < 0).all()
    assert gae(target, target, reward, 0.99, 0.95)[140] > 0.05


def test_the_audit_says_so():
    frames = Frames(np.zeros(4, np.int64), np.array(["a"] * 4, object), *[np.zeros(4, bool)] * 2, np.ones(4, bool))
    for gamma, expected in ((0.99, True), (1.0, False)):
        rules = LabelRules(estimator="gae", gamma=gamma)
        found = audit(frames, np.arange(4.0), indicators(frames, np.arange(4.0), rules), rules).warnings
        assert any(text.startswith("gamma 0.99: ") and "use --gamma 1" in text for text in found) is expected


@given(lengths, st.booleans(), shares, shares)
def test_the_rules_choose_the_estimator(length, success, gamma, lam):
    arrays = episode(length, success)
    rules = LabelRules(estimator="gae", gamma=gamma, lam=lam)
    np.testing.assert_array_equal(estimate(*arrays, rules), gae(*arrays, gamma, lam))
    np.testing.assert_array_equal(estimate(*arrays, LabelRules(n=7)), advantage(*arrays, 7))


@pytest.mark.parametrize(("name", "value"), [("gamma", -0.1), ("gamma", 1.5), ("lam", 2.0), ("lam", float("nan"))])
def test_numbers_outside_their_range_are_refused(name, value):
    with pytest.raises(AdvantageError, match=rf"{name}: expected a number in \[0, 1\], got {value}"):
        gae(*episode(5, True), **{name: value})
    with pytest.raises(AdvantageError, match=rf"{name}: expected a share in \[0, 1\], got {value}"):
        LabelRules(**{name: value})


def test_nan_and_other_lengths_are_refused():
    target, value, reward = episode(5, True)
    with pytest.raises(ValueError, match="values: expected finite numbers, got 1 NaN"):
        gae(target, np.where(np.arange(5) == 2, np.nan, value), reward)
    with pytest.raises(AdvantageError, match=r"one shape \[T\], got \(5,\), \(4,\) and \(5,\)"):
        gae(target, value[1:], reward)
