"""Was this frame better than the critic expected? Advantages, thresholds and the indicator. numpy only.

Frames travel as arrays of equal length [F] in dataset order (`Frames`): whole episodes, one after the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recap_model.conditioning import NEGATIVE, POSITIVE
from recap_model.returns import Floats, finite

Source = Literal["computed", "intervention", "expert", "outcome", "imported"]
SOURCES: tuple[Source, ...] = ("computed", "intervention", "expert", "outcome", "imported")


class AdvantageError(ValueError):
    """Arrays or rules from which no label can be made."""


@dataclass(frozen=True)
class Frames:
    """What the labels depend on besides the advantage, each array [F].

    episode int64 (frames of an episode are contiguous and in time order); task object (str); intervention bool: a human
    acted; demonstration bool: the whole episode was a human's; success bool: the episode's outcome.
    """

    episode: NDArray[np.int64]
    task: NDArray[np.object_]
    intervention: NDArray[np.bool_]
    demonstration: NDArray[np.bool_]
    success: NDArray[np.bool_]

    def __post_init__(self) -> None:
        sizes = {name: len(getattr(self, name)) for name in self.__dataclass_fields__}
        if len(set(sizes.values())) != 1:
            raise AdvantageError(f"frames: expected arrays of one length, got {sizes}")

    def __len__(self) -> int:
        return len(self.episode)

    def episodes(self) -> Iterator[slice]:
        """One slice per episode, in order."""
        starts = np.flatnonzero(np.r_[True, np.diff(self.episode) != 0]) if len(self) else np.zeros(0, int)
        for start, stop in zip(starts, [*starts[1:], len(self)], strict=True):
            yield slice(int(start), int(stop))


@dataclass(frozen=True)
class LabelRules:
    """How frames become positive or negative.

    estimator: "n-step" (`advantage`) or "gae" (`gae`). n: look-ahead of n-step in frames; None takes the whole rest of
    the episode (the pre-training form). gamma, lam: of gae.
    positive_fraction, demonstration_fraction: the share of autonomous frames of rollouts, and of frames of
    demonstrations, that the threshold leaves positive, per task.
    threshold_over: "all" frames of the group, or those of its "successes". threshold_scope: a threshold for every
    "task", or one for the "dataset", which compares tasks of different lengths. threshold_rule: "above" labels what is
    strictly above the threshold, at most the share; "percentile" what reaches numpy's percentile, ties included: with
    "dataset" the rule of openpi forks.
    mode: "computed" from the advantage; "expert" everything positive; "outcome" positive where the episode succeeded;
    "imported": the indicators come from elsewhere, and `indicators` refuses.
    interventions: positive in "all" episodes, only in "successes", or "computed" like any other frame.
    negative_before_intervention: autonomous frames just before a takeover that are negative whatever their advantage.
    failures_negative: autonomous frames of failed episodes are negative whatever their advantage. Their C_fail cancels
    out of the N-step advantage everywhere but at the end, so without this an optimistic critic labels them positive.
    """

    n: int | None = 50
    positive_fraction: float = 0.4
    demonstration_fraction: float = 0.3
    threshold_over: Literal["all", "successes"] = "all"
    mode: Literal["computed", "expert", "outcome", "imported"] = "computed"
    interventions: Literal["all", "successes", "computed"] = "all"
    negative_before_intervention: int = 0
    failures_negative: bool = False
    estimator: Literal["n-step", "gae"] = "n-step"
    gamma: float = 1.0
    lam: float = 0.95
    threshold_scope: Literal["task", "dataset"] = "task"
    threshold_rule: Literal["above", "percentile"] = "above"

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise AdvantageError(f"n: expected at least 1 frame (or none for the whole episode), got {self.n}")
        for name in ("positive_fraction", "demonstration_fraction", "gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise AdvantageError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")
        if self.negative_before_intervention < 0:
            raise AdvantageError(
                "negative_before_intervention: expected a number of frames >= 0, got "
                f"{self.negative_before_intervention}"
            )


@dataclass(frozen=True)
class Labels:
    """indicator int8 [F] (1 positive, 0 negative); threshold float64 [F] (of the frame's group); source object [F]."""

    indicator: NDArray[np.int8]
    threshold: Floats
    source: NDArray[np.object_]


def advantage(returns: ArrayLike, values: ArrayLike, rewards_normalised: ArrayLike, n: int | None) -> Floats:
    """Advantage at every frame of one episode, float64 [T].

    A_t = r_t + ... + r_{t+n-1} + V_{t+n} - V_t while t + n < T, else R_t - V_t. n = None takes n = T: R_t - V_t
    throughout. `returns` are the clamped returns the critic was trained on, `rewards_normalised` are in the same unit.
    Raises ValueError on NaN, infinity or arrays of different lengths.
    """
    target, value, reward = _episode(returns, values, rewards_normalised)
    if n is not None and n < 1:
        raise AdvantageError(f"n: expected at least 1 frame, got {n}")
    length = len(target)
    result = target - value
    if n is not None and n < length:
        cumulative = np.r_[0.0, np.cumsum(reward)]
        body = length - n
        result[:body] = cumulative[n:length] - cumulative[:body] + value[n:] - value[:body]
    return result


def gae(
    returns: ArrayLike, values: ArrayLike, rewards_normalised: ArrayLike, gamma: float = 1.0, lam: float = 0.95
) -> Floats:
    """Generalised advantage estimate at every frame of one episode, float64 [T] (arXiv 1506.02438, equation 16).

    A_t = d_t + gamma lam A_{t+1} with d_t = r_t + gamma V_{t+1} - V_t, and d_{T-1} = R_{T-1} - V_{T-1}: what the last
    frame is compared with is the return that the critic learned for it, 0 after a success and -1 (or -C_fail / T_max)
    after a failure, never a bare 0. So no failure ends above what its own target says.
    lam = 0 is the one-step advantage, gamma = lam = 1 the whole rest of the episode before the clamp of the returns.
    The critic's values are undiscounted: gamma < 1 adds (1 - gamma) |V_{t+1}| to every d_t, most where the robot is
    furthest from success. Arrays and errors as in `advantage`.
    """
    target, value, reward = _episode(returns, values, rewards_normalised)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise AdvantageError(f"{name}: expected a number in [0, 1], got {number}")
    result = target - value
    result[:-1] = reward[:-1] + gamma * value[1:] - value[:-1]
    for t in range(len(result) - 2, -1, -1):
        result[t] += gamma * lam * result[t + 1]
    return result


def estimate(returns: ArrayLike, values: ArrayLike, rewards_normalised: ArrayLike, rules: LabelRules) -> Floats:
    """The advantage of one episode by the estimator of `rules`, float64 [T]."""
    if rules.estimator == "gae":
        return gae(returns, values, rewards_normalised, rules.gamma, rules.lam)
    return advantage(returns, values, rewards_normalised, rules.n)


def _episode(returns: ArrayLike, values: ArrayLike, rewards: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """The three as finite arrays of one shape [T]."""
    target, value, reward = finite(returns, "returns"), finite(values, "values"), finite(rewards, "rewards")
    if not target.shape == value.shape == reward.shape or target.ndim != 1 or not len(target):
        raise AdvantageError(
            f"advantage: expected returns, values and rewards of one shape [T], got {target.shape}, "
            f"{value.shape} and {reward.shape}"
        )
    return target, value, reward


def threshold(advantages: ArrayLike, positive_fraction: float) -> float:
    """The number that at most `positive_fraction` of `advantages` are strictly above: exactly that share (rounded down)
    when all are distinct, fewer when there are ties at the threshold, because a tie is no evidence of being better."""
    ordered = np.sort(finite(advantages, "advantages").reshape(-1))
    if not ordered.size:
        raise AdvantageError("advantages: expected at least one, got none")
    if not 0 <= positive_fraction <= 1:
        raise AdvantageError(f"positive_fraction: expected a share in [0, 1], got {positive_fraction}")
    above = int(ordered.size * positive_fraction + 1e-9)
    if above >= ordered.size:
        return float(np.nextafter(ordered[0], -np.inf))
    return float(ordered[ordered.size - above - 1])


def thresholds(frames: Frames, advantages: Floats, rules: LabelRules) -> Floats:
    """Every frame's threshold, float64 [F]: per (task, demonstration) group, over its autonomous frames; one for all
    tasks with threshold_scope "dataset"."""
    result = np.zeros(len(frames))
    tasks = [frames.task == task for task in sorted(set(frames.task))]
    for task in tasks if rules.threshold_scope == "task" else [np.ones(len(frames), bool)]:
        for demonstration in (False, True):
            group = task & (frames.demonstration == demonstration)
            if group.any():
                share = rules.demonstration_fraction if demonstration else rules.positive_fraction
                result[group] = _group_threshold(frames, advantages, group, share, rules)
    return result


def _group_threshold(
    frames: Frames, advantages: Floats, group: NDArray[np.bool_], share: float, rules: LabelRules
) -> float:
    own = group & ~frames.intervention
    if not own.any():  # nothing autonomous to compare with: the frames that are labelled set their own scale
        own = group
    if rules.threshold_over == "successes":
        if not (own & frames.success).any():
            top = threshold(advantages[own], 0.0)  # no success in this group: nothing in it is positive
            return float(np.nextafter(top, np.inf)) if rules.threshold_rule == "percentile" else top
        own = own & frames.success
    if rules.threshold_rule == "percentile":
        return float(np.percentile(advantages[own], 100.0 - 100.0 * share))
    return threshold(advantages[own], share)


def indicators(frames: Frames, advantages: ArrayLike, rules: LabelRules) -> Labels:
    """Label every frame. Order of rules, later ones win: threshold, failures, frames before a takeover, interventions;
    the modes "expert" and "outcome" replace all of them."""
    advantage_ = finite(advantages, "advantages")
    if advantage_.shape != (len(frames),):
        raise AdvantageError(f"advantages: expected shape ({len(frames)},), got {advantage_.shape}")
    if rules.mode == "imported":
        raise AdvantageError("mode: expected computed, expert or outcome, got imported: there is nothing to compute")
    limit = thresholds(frames, advantage_, rules)
    source = np.full(len(frames), "computed", dtype=object)
    if rules.mode != "computed":
        positive = frames.success.copy() if rules.mode == "outcome" else np.ones(len(frames), bool)
        source[:] = rules.mode
        return Labels(_as_indicator(positive), limit, source)
    positive = advantage_ >= limit if rules.threshold_rule == "percentile" else advantage_ > limit
    if rules.failures_negative:
        lost = ~frames.success & ~frames.intervention
        positive[lost], source[lost] = False, "outcome"
    if rules.negative_before_intervention:
        before = _before_intervention(frames, rules.negative_before_intervention)
        positive[before], source[before] = False, "intervention"
    if rules.interventions != "computed":
        forced = frames.intervention & (frames.success | (rules.interventions == "all"))
        positive[forced], source[forced] = True, "intervention"
        lost = frames.intervention & ~forced
        if rules.failures_negative:
            positive[lost], source[lost] = False, "outcome"
    return Labels(_as_indicator(positive), limit, source)


def _before_intervention(frames: Frames, count: int) -> NDArray[np.bool_]:
    """Autonomous frames at most `count` frames before a takeover in the same episode."""
    result = np.zeros(len(frames), bool)
    for rows in frames.episodes():
        human = frames.intervention[rows]
        for start in np.flatnonzero(human & ~np.r_[False, human[:-1]]):
            result[rows.start + max(0, start - count) : rows.start + start] = True
    return result & ~frames.intervention


def _as_indicator(positive: NDArray[np.bool_]) -> NDArray[np.int8]:
    return np.where(positive, POSITIVE, NEGATIVE).astype(np.int8)
