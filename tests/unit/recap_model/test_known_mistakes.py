"""Mistakes that public re-implementations of RECAP made, each beside ours on the same seeded synthetic episodes.

Every test computes the other formula, shows what goes wrong with it, then what happens here.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_factory import TOKENIZER, make_table
from recap_model.advantage import Frames, LabelRules, advantage, gae, indicators
from recap_model.audit import audit
from recap_model.conditioning import NONE, prompt
from recap_model.returns import normalised_rewards, returns
from training.loader import Loader

N = 50


class Episodes:
    """Synthetic episodes of one task, with a critic that is right up to noise: outcomes, lengths, noise seeds."""

    def __init__(self, lengths, won, tasks=None):
        self.lengths, self.won = list(lengths), list(won)
        self.names = tasks or ["a"] * len(self.won)

    def frames(self, intervention=None):
        spread = lambda values, kind: np.repeat(np.array(values, dtype=kind), self.lengths)  # noqa: E731
        total = sum(self.lengths)
        return Frames(spread(range(len(self.won)), np.int64), spread(self.names, object),
                      np.zeros(total, bool) if intervention is None else intervention, np.zeros(total, bool),
                      spread(self.won, bool))  # fmt: skip

    def ours(self, sigma, rules, seed=0):
        """(advantages by `advantage`, labels, audit) with returns normalised by the longest success of each task."""
        rng, parts, frames = np.random.default_rng(seed), [], self.frames()
        longest = {t: max(n for n, w, name in self if w and name == t) for t in set(self.names)}
        for length, success, task in self:
            target = returns(length, success, longest[task])
            value = np.clip(target + rng.normal(0, sigma, length), -1, 0)
            parts.append(advantage(target, value, normalised_rewards(length, success, longest[task]), rules.n))
        advantages = np.concatenate(parts)
        labels = indicators(frames, advantages, rules)
        return advantages, labels, audit(frames, advantages, labels, rules)

    def __iter__(self):
        return zip(self.lengths, self.won, self.names, strict=True)

    def where(self, what):
        """Frames bool [F] chosen by what(frame numbers [T], length, success)."""
        return np.concatenate([what(np.arange(length), length, success) for length, success, _ in self])


def thirty_of_hundred():
    """30 successes of about 1100 frames, 70 timeouts at 2000: failures have four fifths of the frames."""
    rng = np.random.default_rng(1)
    return Episodes([int(n) for n in rng.integers(900, 1300, 30)] + [2000] * 70, [True] * 30 + [False] * 70)


def openpi_fork(episodes, sigma, terminal, seed=0):
    """A_t = sum of reward_label + V_{t+N} - V_t with V = 0 after the end; normalised by the episode's own length."""
    rng, parts = np.random.default_rng(seed), []
    for length, success, _ in episodes:
        value_label = -np.arange(length - 1, -1, -1.0) / length if success else np.full(length, -1.0)
        value = np.clip(value_label + rng.normal(0, sigma, length), -1, 0)
        reward = np.full(length, -1 / length)
        reward[-1] = 0.0 if success else terminal
        total, t = np.r_[0.0, np.cumsum(reward)], np.arange(length)
        ahead = np.where(t + N < length, value[np.minimum(t + N, length - 1)], 0.0)
        parts.append(total[np.minimum(t + N, length)] - total[t] + ahead - value)
    return np.round(np.concatenate(parts), 12)  # equal advantages are equal, whatever the order of the sum


def failure_tail(t, length, success):
    return (t >= length - N) & (not success)


def mid_failure(t, length, success):
    return (t < length - N) & (not success)


class TestTerminalSign:
    """A failure whose reward_label ends with 0, and a bootstrap of 0 after it: the moments before it look best."""

    @pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
    def test_there_the_tails_of_failures_are_the_best_frames_of_all(self, sigma):
        episodes = thirty_of_hundred()
        theirs, tail = openpi_fork(episodes, sigma, terminal=0.0), episodes.where(failure_tail)
        assert 0.94 < theirs[tail].mean() < 0.99
        for top in (5, 30, 50):
            assert (theirs >= np.percentile(theirs, 100 - top))[tail].mean() >= (1.0 if top > 5 else 0.9)

    @pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
    def test_here_no_tail_of_a_failure_is_above_zero(self, sigma):
        episodes = thirty_of_hundred()
        ours, _, _ = episodes.ours(sigma, LabelRules(n=N))
        assert (ours[episodes.where(failure_tail)] <= 0).all()

    @given(st.integers(1, 80), st.integers(1, 80), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
    def test_here_by_either_estimator_and_any_critic(self, length, n, gamma, lam, seed):
        value = np.random.default_rng(seed).uniform(-1, 0, length)
        target, reward = returns(length, False, 40.0), normalised_rewards(length, False, 40.0)
        assert (advantage(target, value, reward, n)[max(0, length - n) :] <= 0).all()
        assert gae(target, value, reward, gamma, lam)[-1] <= 0


class TestCostOfFailureCancels:
    """R unclamped with C_fail = 10000, V clamped: the cost is in R_t and R_{t+N} alike and leaves their difference."""

    LENGTHS = [int(n) for n in np.random.default_rng(2).integers(76, 134, 386)] + [280] * 214
    EPISODES = Episodes(LENGTHS, [True] * 386 + [False] * 214)

    def theirs(self, sigma):
        rng, parts = np.random.default_rng(0), []
        for length, success, _ in self.EPISODES:
            target = -(np.arange(length - 1, -1, -1.0) + (0 if success else 10_000)) / 280
            error = target - np.clip(np.clip(target, -1, 0) + rng.normal(0, sigma, length), -1, 0)
            parts.append(np.r_[error[:-N] - error[N:], error[-N:]])
        return np.concatenate(parts)

    @pytest.mark.parametrize(("sigma", "positive"), [(0.02, 0.0), (0.1, 0.13), (0.2, 0.32)])
    def test_there_mid_failure_looks_like_lost_time_and_the_last_frames_carry_everything(self, sigma, positive):
        theirs, won = self.theirs(sigma), self.EPISODES.frames().success
        middle, tail = self.EPISODES.where(mid_failure), self.EPISODES.where(failure_tail)
        assert theirs[middle].mean() == pytest.approx(-N / 280, abs=0.002)
        assert -36 < theirs[tail].mean() < -34
        above = theirs > np.percentile(theirs[won], 20)  # positive fraction 0.8 of successes
        assert above[middle].mean() == pytest.approx(positive, abs=0.02)

    @pytest.mark.parametrize("sigma", [0.02, 0.1, 0.2])
    def test_here_the_clamp_ends_the_spike_and_the_audit_counts_what_is_left(self, sigma):
        rules = LabelRules(n=N, positive_fraction=0.8, threshold_over="successes")
        ours, labels, found = self.EPISODES.ours(sigma, rules)
        middle, won = self.EPISODES.where(mid_failure), self.EPISODES.frames().success
        assert ours.min() >= -2 and (ours[self.EPISODES.where(failure_tail)] >= -1).all()
        theirs = self.theirs(sigma)
        assert (labels.indicator[middle] == 1).mean() <= (theirs > np.percentile(theirs[won], 20))[middle].mean()
        counted = (labels.indicator == 1) & ~won
        assert found.failed_share == pytest.approx(counted.sum() / (labels.indicator == 1).sum())
        assert any("failed episodes supply" in text for text in found.warnings) is (found.failed_share > 0.1)

    def test_here_one_rule_ends_positives_out_of_failures(self):
        _, labels, found = self.EPISODES.ours(0.2, LabelRules(n=N, positive_fraction=0.8, failures_negative=True))
        assert found.failed_share == 0 and (labels.indicator == 1).any()


class TestGlobalThreshold:
    """One percentile over all frames, with values normalised by each episode's own length."""

    @pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
    @pytest.mark.parametrize("terminal", [0.0, -1.0])
    def test_there_most_positives_come_from_failures(self, sigma, terminal):
        episodes = thirty_of_hundred()
        theirs, won = openpi_fork(episodes, sigma, terminal), episodes.frames().success
        above = theirs >= np.percentile(theirs, 70)
        assert 0.55 <= (above & ~won).sum() / above.sum() <= 0.72

    @pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
    def test_here_the_share_is_shown_and_warned_about_and_can_be_ended(self, sigma):
        episodes = thirty_of_hundred()
        _, labels, found = episodes.ours(sigma, LabelRules(n=N, positive_fraction=0.3))
        won = episodes.frames().success
        share = ((labels.indicator == 1) & ~won).sum() / (labels.indicator == 1).sum()
        assert found.failed_share == pytest.approx(share) and share > 0.1
        assert found.warnings[0].startswith(f"failed episodes supply {share:.0%} of the positive frames (limit 10%;")
        over = LabelRules(n=N, positive_fraction=0.3, threshold_over="successes")
        assert episodes.ours(sigma, over)[2].failed_share < share
        for rules in (LabelRules(n=N, failures_negative=True), LabelRules(n=N, mode="outcome")):
            assert episodes.ours(sigma, rules)[2].failed_share == 0

    def test_a_perfect_critic_ties_there_and_is_warned_about_here(self):
        episodes = thirty_of_hundred()
        theirs = openpi_fork(episodes, 0.0, terminal=-1.0)
        assert (theirs >= np.percentile(theirs, 70)).mean() > 0.6  # 0.3 were asked for
        _, labels, _ = episodes.ours(0.0, LabelRules(n=N, positive_fraction=0.3))
        assert (labels.indicator == 1).mean() <= 0.3
        same = LabelRules(n=N, positive_fraction=0.3, threshold_rule="percentile", threshold_scope="dataset")
        _, labels, found = episodes.ours(0.0, same)
        assert (labels.indicator == 1).mean() > 0.6
        assert any("equal advantages at the threshold all count" in text for text in found.warnings)

    def test_one_threshold_for_all_tasks_labels_the_task_and_not_the_frame(self):
        rng = np.random.default_rng(0)
        frames = Episodes([1000, 1000], [True, True], ["easy", "hard"]).frames()
        advantages = np.r_[rng.normal(0, 0.1, 1000), rng.normal(-0.15, 0.1, 1000)]
        shares = {}
        for scope in ("dataset", "task"):
            labels = indicators(frames, advantages, LabelRules(positive_fraction=0.3, threshold_scope=scope))
            shares[scope] = [(labels.indicator[frames.task == task] == 1).mean() for task in ("easy", "hard")]
        assert shares["dataset"][0] > 0.5 and shares["dataset"][1] < 0.1
        assert shares["task"] == [0.3, 0.3]

    def test_corrections_in_a_lost_episode_are_positive_there_and_a_choice_here(self):
        human = np.r_[np.zeros(40, bool), np.ones(20, bool)]
        frames, advantages = Episodes([30, 30], [True, False]).frames(np.r_[human[30:], human[30:]]), np.zeros(60)
        lost = frames.intervention & ~frames.success
        all_ = indicators(frames, advantages, LabelRules())
        gated = indicators(frames, advantages, LabelRules(interventions="successes"))
        assert (all_.indicator[lost] == 1).all() and (gated.indicator[lost] == 0).all()
        assert (gated.indicator[frames.intervention & frames.success] == 1).all()


def test_nan_becomes_a_positive_label_there_and_an_error_here():
    advantages = np.array([-0.3, np.nan, -0.1, -0.2])
    epsilon = np.nanpercentile(advantages, 50)
    assert epsilon < 0 and (np.nan_to_num(advantages, nan=0.0) > epsilon)[1]
    frames = Episodes([4], [True]).frames()
    with pytest.raises(ValueError, match="advantages: expected finite numbers, got 1 NaN or infinite, the first at 1"):
        indicators(frames, advantages, LabelRules())
    with pytest.raises(ValueError, match="values: expected finite numbers"):
        advantage(np.zeros(4), advantages, np.zeros(4), N)


def test_the_clause_is_dropped_for_whole_batches_there_and_for_single_samples_here():
    table = make_table()
    rng, steps, size = np.random.default_rng(0), 50, 200
    theirs = [np.full(size, rng.random() < 0.3).mean() for _ in range(steps)]
    assert set(theirs) == {0.0, 1.0}
    loader = Loader(table, TOKENIZER, chunk=1, dropout=0.3, shift=0, seed=0)
    bare = {tuple(TOKENIZER(prompt(task, NONE))[0]) for task in table.tasks}
    rows = np.random.default_rng(1).integers(0, len(table), size)
    ours = [np.mean([tuple(ids) in bare for ids in loader(rows, step).tokens]) for step in range(steps)]
    assert min(ours) > 0.1 and max(ours) < 0.5 and np.mean(ours) == pytest.approx(0.3, abs=0.02)


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_failure_is_a_success_there_and_minus_one_throughout_here(length, t_max):
    """There `calculate_returns` was called without the outcomes: every episode counts down to 0."""
    theirs = -np.arange(length - 1, -1, -1.0) / max(length, t_max)
    assert theirs[-1] == 0
    assert (returns(length, False, t_max) == -1).all()
    assert returns(length, True, t_max)[-1] == 0


@given(st.integers(0, 40), st.integers(1, 40))
def test_the_warning_about_failures_comes_exactly_above_ten_percent(lost, won):
    frames = Episodes([40, 40], [False, True]).frames()
    rules = LabelRules()
    labels = indicators(frames, np.zeros(80), rules)
    labels.indicator[:] = np.r_[np.arange(40) < lost, np.arange(40) < won]
    warned = any(
        text.startswith("failed episodes supply") for text in audit(frames, np.zeros(80), labels, rules).warnings
    )
    assert warned is (lost / (lost + won) > 0.1)
