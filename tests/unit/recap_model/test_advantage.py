"""Laws of advantages, thresholds and labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from recap_model.advantage import AdvantageError, Frames, LabelRules, advantage, indicators, threshold, thresholds
from recap_model.returns import normalised_rewards, returns

lengths = st.integers(1, 120)
horizons = st.none() | st.integers(1, 150)


def episode(length, success, t_max, seed=0):
    value = np.random.default_rng(seed).uniform(-1, 0, length)
    return returns(length, success, t_max), value, normalised_rewards(length, success, t_max)


class TestAdvantage:
    @given(lengths, horizons, st.floats(1, 3))
    def test_a_perfect_critic_of_a_success_has_no_advantage_anywhere(self, length, n, slack):
        target = returns(length, True, length * slack)
        got = advantage(target, target, normalised_rewards(length, True, length * slack), n)
        np.testing.assert_allclose(got, 0, atol=1e-9)

    @given(lengths, horizons, st.integers(1, 120))
    def test_a_perfect_critic_of_a_failure_sees_only_lost_time(self, length, n, t_max):
        target = returns(length, False, t_max)
        got = advantage(target, target, normalised_rewards(length, False, t_max), n)
        assert (got <= 1e-9).all()
        assert got[-1] == 0

    @given(lengths, horizons, st.booleans(), st.integers(0, 99))
    def test_it_is_the_sum_over_the_window_plus_what_the_critic_says_after_it(self, length, n, success, seed):
        target, value, reward = episode(length, success, 60.0, seed)
        got = advantage(target, value, reward, n)
        n = length if n is None else n
        for t in range(length):
            expected = target[t] - value[t] if t + n >= length else reward[t : t + n].sum() + value[t + n] - value[t]
            assert got[t] == pytest.approx(expected, abs=1e-9)

    @given(lengths, st.integers(1, 10), st.integers(0, 99))
    def test_windows_telescope(self, length, n, seed):
        """Advantages a window apart add up to the whole way: R_t - V_t, whatever the critic said in between."""
        target, value, reward = episode(length, True, 200.0, seed)
        got = advantage(target, value, reward, n)
        for t in range(min(length, 5)):
            assert got[t::n].sum() == pytest.approx(target[t] - value[t], abs=1e-9)

    @given(lengths, st.integers(0, 50), st.booleans())
    def test_a_horizon_beyond_the_episode_is_the_monte_carlo_form(self, length, extra, success):
        arrays_ = episode(length, success, 60.0)
        np.testing.assert_array_equal(advantage(*arrays_, length + extra), advantage(*arrays_, None))

    @given(lengths, st.floats(-0.5, 0.5), st.booleans())
    def test_a_constant_error_of_the_critic_cancels_inside_and_counts_at_the_end(self, length, offset, success):
        target, value, reward = episode(length, success, 60.0)
        moved = advantage(target, value + offset, reward, 7) - advantage(target, value, reward, 7)
        np.testing.assert_allclose(moved[:-7], 0, atol=1e-9)
        np.testing.assert_allclose(moved[-7:], -offset, atol=1e-9)

    def test_a_critic_that_foresees_the_failure_gives_its_tail_no_credit(self):
        """The end of a failure is compared with -1, not with 0, which would make it the best moment of the data."""
        target, _, reward = episode(40, False, 40.0)
        assert (advantage(target, np.full(40, -0.95), reward, 50) < 0).all()

    def test_one_frame(self):
        assert advantage([0.0], [-0.25], [0.0], 50).tolist() == [0.25]
        assert advantage([-1.0], [-0.25], [-1.0], 1).tolist() == [-0.75]

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_nan_is_an_error(self, which):
        arrays_ = [array.copy() for array in episode(9, True, 9.0)]
        arrays_[which][4] = np.nan
        with pytest.raises(ValueError, match="NaN"):
            advantage(*arrays_, 3)

    def test_arrays_of_different_lengths_are_refused(self):
        with pytest.raises(AdvantageError, match="one shape"):
            advantage([0.0, 0.0], [0.0], [0.0, 0.0], 1)
        with pytest.raises(AdvantageError, match="n: expected"):
            advantage([0.0], [0.0], [0.0], 0)


class TestThreshold:
    @given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=200, unique=True), st.floats(0, 1))
    def test_the_positive_share_is_exact_for_distinct_values(self, values, share):
        above = sum(value > threshold(values, share) for value in values)
        assert above <= share * len(values) + 1e-6 and above > share * len(values) - 1

    @given(st.lists(st.integers(-3, 3), min_size=1, max_size=200), st.floats(0, 0.999))
    def test_ties_are_never_above(self, values, share):
        assert sum(value > threshold(values, share) for value in values) <= share * len(values) + 1e-6

    @given(st.lists(st.floats(-1, 1), min_size=1, max_size=50), st.floats(0, 1), st.floats(0, 1))
    def test_a_larger_share_never_has_a_higher_threshold(self, values, one, other):
        low, high = sorted([one, other])
        assert threshold(values, high) <= threshold(values, low)

    @given(st.lists(st.floats(-1, 1), min_size=1, max_size=50), st.floats(0, 1), st.randoms(use_true_random=False))
    def test_the_order_does_not_matter(self, values, share, random):
        assert threshold(random.sample(values, len(values)), share) == threshold(values, share)

    def test_the_ends(self):
        assert threshold([1.0, 2.0], 0.0) == 2.0
        assert threshold([1.0, 2.0], 1.0) < 1.0
        assert threshold([0.5] * 10, 0.4) == 0.5

    def test_unusable_input_is_refused(self):
        for values, share in (([], 0.4), ([1.0], 1.1), ([1.0, np.nan], 0.4)):
            with pytest.raises(ValueError, match=r"advantages|positive_fraction"):
                threshold(values, share)


def frames_of(spec):
    """spec: per episode (task, length, success, demonstration, intervention slice or None)."""
    columns = {name: [] for name in ("episode", "task", "intervention", "demonstration", "success")}
    for index, (task, length, success, demonstration, human) in enumerate(spec):
        mask = np.zeros(length, bool)
        if human is not None:
            mask[human] = True
        columns["episode"].append(np.full(length, index))
        columns["task"].append(np.full(length, task, dtype=object))
        columns["intervention"].append(mask)
        columns["demonstration"].append(np.full(length, demonstration))
        columns["success"].append(np.full(length, success))
    return Frames(**{name: np.concatenate(parts) for name, parts in columns.items()})


episodes = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.integers(1, 30),
        st.booleans(),
        st.booleans(),
        st.none() | st.tuples(st.integers(0, 20), st.integers(1, 20)).map(lambda at: slice(at[0], sum(at))),
    ),
    min_size=1,
    max_size=8,
)


def spread(frames, seed=0):
    """Distinct advantages in random order."""
    return np.random.default_rng(seed).permutation(len(frames)) / len(frames) - 0.5


class TestLabels:
    @given(episodes, st.floats(0, 1), st.floats(0, 1))
    def test_the_positive_share_of_autonomous_frames_holds_in_every_group(self, spec, rollouts, demonstrations):
        frames = frames_of(spec)
        rules = LabelRules(positive_fraction=rollouts, demonstration_fraction=demonstrations)
        labels = indicators(frames, spread(frames), rules)
        for task in "ab":
            for demonstration, share in ((False, rollouts), (True, demonstrations)):
                group = (frames.task == task) & (frames.demonstration == demonstration) & ~frames.intervention
                count = int((labels.indicator[group] == 1).sum())
                assert count <= share * group.sum() + 1e-6 and count > share * group.sum() - 1 - 1e-6

    @given(episodes)
    def test_another_task_changes_nothing(self, spec):
        frames = frames_of(spec)
        values, rules = spread(frames), LabelRules()
        together = indicators(frames, values, rules)
        mine = frames.task == "a"
        if mine.any():
            alone = indicators(
                Frames(*(getattr(frames, name)[mine] for name in Frames.__dataclass_fields__)), values[mine], rules
            )
            np.testing.assert_array_equal(alone.indicator, together.indicator[mine])
            np.testing.assert_array_equal(alone.threshold, together.threshold[mine])

    @given(episodes, st.integers(-50, 50))
    def test_only_the_order_of_advantages_counts(self, spec, shift):
        frames = frames_of(spec)
        values = spread(frames)
        np.testing.assert_array_equal(
            indicators(frames, values, LabelRules()).indicator,
            indicators(frames, values * 4 + shift, LabelRules()).indicator,
        )

    @given(episodes)
    def test_interventions_are_positive(self, spec):
        frames = frames_of(spec)
        labels = indicators(frames, spread(frames), LabelRules(positive_fraction=0.0, demonstration_fraction=0.0))
        np.testing.assert_array_equal(labels.indicator == 1, frames.intervention)
        np.testing.assert_array_equal(labels.source == "intervention", frames.intervention)

    @given(episodes)
    def test_interventions_only_in_successes(self, spec):
        frames = frames_of(spec)
        rules = LabelRules(
            positive_fraction=0.0, demonstration_fraction=0.0, interventions="successes", failures_negative=True
        )
        labels = indicators(frames, spread(frames), rules)
        np.testing.assert_array_equal(labels.indicator == 1, frames.intervention & frames.success)
        assert set(labels.source[~frames.success]) <= {"outcome"}

    @given(episodes, st.floats(0, 1))
    def test_failures_negative_leaves_no_positive_policy_frame_in_a_failure(self, spec, share):
        frames = frames_of(spec)
        labels = indicators(frames, spread(frames), LabelRules(positive_fraction=share, failures_negative=True))
        assert not (labels.indicator[~frames.success & ~frames.intervention] == 1).any()

    def test_frames_before_a_takeover_are_negative_within_the_episode_only(self):
        frames = frames_of([("a", 10, True, False, None), ("a", 10, True, False, slice(2, 5))])
        rules = LabelRules(positive_fraction=1.0, negative_before_intervention=4)
        labels = indicators(frames, spread(frames), rules)
        assert np.flatnonzero(labels.indicator == 0).tolist() == [10, 11]
        assert (labels.source[10:15] == "intervention").all() and labels.source[9] == "computed"

    @given(episodes)
    def test_expert_and_outcome_modes(self, spec):
        frames = frames_of(spec)
        assert (indicators(frames, spread(frames), LabelRules(mode="expert")).indicator == 1).all()
        outcome = indicators(frames, spread(frames), LabelRules(mode="outcome"))
        np.testing.assert_array_equal(outcome.indicator == 1, frames.success)
        assert set(outcome.source) == {"outcome"}

    def test_thresholds_over_successes_only(self):
        frames = frames_of([("a", 10, True, False, None), ("a", 10, False, False, None), ("b", 5, False, False, None)])
        values = np.r_[np.arange(10.0), np.full(10, 4.5), np.arange(5.0)]
        labels = indicators(frames, values, LabelRules(positive_fraction=0.5, threshold_over="successes"))
        assert (labels.indicator[:10] == 1).sum() == 5
        assert labels.indicator[10:20].tolist() == [1] * 10 and not (labels.indicator[20:] == 1).any()

    def test_demonstrations_and_rollouts_have_their_own_thresholds(self):
        frames = frames_of([("a", 10, True, False, None), ("a", 10, True, True, None)])
        values = np.r_[np.arange(10.0), np.arange(100.0, 110.0)]
        got = thresholds(frames, values, LabelRules(positive_fraction=0.4, demonstration_fraction=0.3))
        assert got[0] == 5.0 and got[-1] == 106.0

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nan_is_never_a_label(self, bad):
        frames = frames_of([("a", 3, True, False, None)])
        with pytest.raises(ValueError, match="NaN"):
            indicators(frames, np.array([0.0, bad, 0.0]), LabelRules())

    def test_unusable_rules_and_columns_are_refused(self):
        for rules in ({"n": 0}, {"positive_fraction": 1.5}, {"negative_before_intervention": -1}):
            with pytest.raises(AdvantageError, match=next(iter(rules))):
                LabelRules(**rules)
        with pytest.raises(AdvantageError, match="one length"):
            Frames(np.zeros(2), np.zeros(3, object), np.zeros(2, bool), np.zeros(2, bool), np.zeros(2, bool))
        with pytest.raises(AdvantageError, match="shape"):
            indicators(frames_of([("a", 3, True, False, None)]), np.zeros(4), LabelRules())


@given(arrays(np.float64, st.integers(2, 60), elements=st.floats(-1, 0)), st.integers(1, 20))
def test_a_better_next_value_never_lowers_the_advantage_before_it(value, n):
    length = len(value)
    target, reward = returns(length, True, 80.0), normalised_rewards(length, True, 80.0)
    better = value.copy()
    better[-1] = min(0.0, better[-1] + 0.1)
    before, after = advantage(target, value, reward, n), advantage(target, better, reward, n)
    assert (after[:-1] >= before[:-1] - 1e-12).all()
