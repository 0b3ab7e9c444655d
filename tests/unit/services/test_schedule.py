"""The schedule: who is next, how many in a run, what cannot be in time. Laws over arbitrary arrivals and run times."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.schedule import PATIENCE, RunTimes, Turn, expected_end, make_turn, next_run

SIZES = (1, 2, 4, 8)
SECONDS = st.floats(1e-4, 1.0)
FEW = settings(max_examples=40)  # lists of requests are slow to draw


def known(seconds: dict[int, float], now: float = 0.0) -> RunTimes:
    """Run times that have just been measured."""
    times = RunTimes(SIZES)
    for size, value in seconds.items():
        for _ in range(3):
            times.record(size, value, now)
    return times


def linear(first: float, further: float) -> RunTimes:
    return known({size: first + further * (size - 1) for size in SIZES})


TIMES = st.fixed_dictionaries({}, optional=dict.fromkeys(SIZES, SECONDS)).map(known)
TURNS = st.builds(
    Turn,
    st.floats(-1.0, 0.0),
    st.floats(-1.0, 10.0),
    st.one_of(st.just(math.inf), st.floats(-0.1, 3.0)),
    st.integers(0, 2 * PATIENCE),
)


@FEW
@given(st.lists(TURNS, max_size=20), TIMES)
def test_a_run_holds_distinct_waiting_requests_that_it_answers_in_time(waiting: list[Turn], times: RunTimes) -> None:
    run = next_run(waiting, times, 0.0)
    gone = [i for i, _ in run.refused]
    assert len({*run.chosen, *gone}) == len(run.chosen) + len(gone)
    assert {*run.chosen, *gone} <= set(range(len(waiting)))
    assert len(run.chosen) <= times.limit
    assert run.chosen or len(gone) == len(waiting)  # something runs unless all are hopeless
    assert all(waiting[i].deadline >= run.ends for i in run.chosen)
    assert all(waiting[i].deadline < ends for i, ends in run.refused)
    assert [waiting[i].rank for i in run.chosen] == sorted(waiting[i].rank for i in run.chosen)
    left = set(range(len(waiting))) - {*run.chosen, *gone}
    assert all(waiting[i].rank >= waiting[run.chosen[-1]].rank for i in left)


@FEW
@given(st.lists(TURNS, max_size=12))
def test_nothing_is_refused_without_evidence_except_what_has_expired(waiting: list[Turn]) -> None:
    assert all(waiting[i].deadline < 0.0 for i, _ in next_run(waiting, RunTimes(SIZES), 0.0).refused)


@FEW
@given(
    st.lists(st.lists(st.floats(0.0, 5.0) | st.none(), max_size=12), max_size=40),
    st.integers(0, 10),
    TIMES,
)
def test_every_request_is_in_a_run_after_a_bounded_number_of_runs(
    arrivals: list[list[float | None]], start: int, times: RunTimes
) -> None:
    """Whatever comes later and however urgent: PATIENCE runs, and one for each that was there before it."""
    waiting: list[tuple[Turn, int, int]] = []  # turn, the number of the run before which it came, bound
    runs = 0
    for step in range(len(arrivals) + 500):
        for runs_out in arrivals[step] if step < len(arrivals) else []:
            patient = make_turn(step, deadline_s=None, runs_out_s=runs_out, replaced=None)
            waiting.append((patient, runs, PATIENCE + len(waiting) + 1))
        if step == start:  # nothing to lose for an hour: everyone else is more urgent
            never = make_turn(step, deadline_s=None, runs_out_s=3600.0, replaced=None)
            waiting.append((never, runs, PATIENCE + len(waiting) + 1))
        if not waiting:
            continue
        run = next_run([turn for turn, _, _ in waiting], times, float(step))
        runs += 1
        assert all(runs - waiting[i][1] <= waiting[i][2] for i in run.chosen) and not run.refused
        waiting = [entry for i, entry in enumerate(waiting) if i not in run.chosen]
        for turn, _, _ in waiting:
            turn.passed += 1
    assert not waiting


def test_who_runs_out_first_goes_first_and_who_tells_nothing_stands_still() -> None:
    said = {"soon": 0.1, "later": 0.4, "gone": -3.0}
    turns = {name: make_turn(0.0, deadline_s=None, runs_out_s=s, replaced=None) for name, s in said.items()}
    turns["silent"] = make_turn(0.05, deadline_s=None, runs_out_s=None, replaced=None)
    turns["deadline"] = make_turn(0.05, deadline_s=0.2, runs_out_s=None, replaced=None)
    order = sorted(turns, key=lambda name: turns[name].rank)
    assert order == ["gone", "silent", "soon", "deadline", "later"]


@given(
    st.floats(0, 9), st.floats(0, 9), st.none() | st.floats(0.01, 1), st.none() | st.floats(-1, 1), st.integers(0, 9)
)
def test_what_replaces_a_request_has_waited_as_long(
    first: float, later: float, deadline_s: float | None, runs_out_s: float | None, passed: int
) -> None:
    older = Turn(first, first, passed=passed)
    turn = make_turn(first + later, deadline_s=deadline_s, runs_out_s=runs_out_s, replaced=older)
    assert (turn.arrived, turn.passed) == (first, passed)
    assert turn.deadline == (math.inf if deadline_s is None else first + later + deadline_s)


def _best(count: int, seconds: dict[int, float]) -> float:
    """The least time for `count` samples over all ways to split them, by brute force; half a millisecond a run."""
    if count <= 0:
        return 0.0
    return min(seconds[size] + 0.0005 + _best(count - size, seconds) for size in SIZES)


@given(st.fixed_dictionaries(dict.fromkeys(SIZES, SECONDS)), st.integers(1, 8))
def test_the_plan_is_the_fastest_of_all_splits(seconds: dict[int, float], count: int) -> None:
    grown = dict(zip(SIZES, sorted(seconds.values()), strict=True))  # a larger run is never faster
    times = known(grown)
    plan = times.plan(count, 0.0)
    assert sum(plan) == count and list(plan) == sorted(plan, reverse=True)
    assert sum(grown[times.size(part)] + 0.0005 for part in plan) == pytest.approx(_best(count, grown))


@pytest.mark.parametrize(
    ("first", "further", "plans"),
    [
        (0.010, 0.0, {3: (3,), 5: (5,), 7: (7,), 8: (8,)}),  # padding costs nothing
        (0.010, 0.010, {3: (2, 1), 5: (4, 1), 7: (4, 2, 1), 8: (8,)}),  # a padded sample costs as much as a real one
        (0.020, 0.010, {3: (3,), 5: (4, 1), 6: (4, 2), 7: (7,), 8: (8,)}),
    ],
)
def test_padding_is_weighed_against_a_further_run(
    first: float, further: float, plans: dict[int, tuple[int, ...]]
) -> None:
    times = linear(first, further)
    assert {count: times.plan(count, 0.0) for count in plans} == plans


def test_a_size_that_only_hurts_is_not_used() -> None:
    times = known({1: 0.01, 2: 0.012, 4: 0.015, 8: 0.5})
    assert times.plan(8, 0.0) == (4, 4) and times.drain_s(16, 0.0) == pytest.approx(0.06)


@FEW
@given(st.dictionaries(st.sampled_from(SIZES), SECONDS), st.integers(1, 8))
def test_an_unmeasured_size_is_bounded_by_the_measured_ones(seconds: dict[int, float], count: int) -> None:
    times = known(seconds)
    size, got = times.size(count), times.seconds(count, 0.0)
    if size in seconds:
        assert got == seconds[size]
    else:
        assert all(got >= t for s, t in seconds.items() if s < size)
        assert all(got >= t * size / s for s, t in seconds.items() if s > size)
        assert got in {0.0, *(t for s, t in seconds.items() if s < size), *(t * size / s for s, t in seconds.items())}


@FEW
@given(st.lists(st.floats(0.5, 5.0), max_size=11), st.permutations(range(16)))
def test_slow_runs_do_not_move_the_estimate_while_a_third_is_normal(slow: list[float], order: list[int]) -> None:
    samples = [0.01] * (16 - len(slow)) + slow
    times = RunTimes(SIZES)
    for i in order:
        times.record(1, samples[i], 0.0)
    assert times.seconds(1, 0.0) == 0.01


@FEW
@given(st.dictionaries(st.sampled_from(SIZES), st.floats(1e-4, 5.0), min_size=1), st.floats(0.0, 100.0))
def test_what_the_warm_up_measured_is_known_at_once_and_forgotten_like_any_run(
    seconds: dict[int, float], now: float
) -> None:
    warm, ran = RunTimes(SIZES), RunTimes(SIZES)
    warm.start(seconds, now)
    for size, value in seconds.items():
        for _ in range(3):
            ran.record(size, value, now)
    for later in (0.0, 1.9, 2.1, 60.0):
        assert [warm.seconds(size, now + later) for size in SIZES] == [ran.seconds(size, now + later) for size in SIZES]
    assert all(warm.seconds(size, now) >= value for size, value in seconds.items())
    for _ in range(16):  # as many as are kept
        warm.record(1, 7.0, now)
    assert warm.seconds(1, now) == 7.0


def test_an_estimate_takes_three_runs_and_is_forgotten_when_nobody_renews_it() -> None:
    times = RunTimes(SIZES)
    for n in (1, 2, 3):
        assert times.seconds(1, 0.0) == 0.0
        times.record(1, 0.1, 0.1 * n)
    assert times.seconds(1, 3.2) == 0.1 and times.seconds(1, 3.4) == 0.0  # 2 s, and ten times 0.1 s
    times.record(1, 0.01, 4.0)
    assert times.seconds(1, 4.0) == 0.0  # the old ones count no more
    times.record(1, 0.01, 4.0)
    times.record(1, 0.02, 4.0)
    assert times.seconds(1, 4.0) == 0.01


@FEW
@given(st.lists(TURNS, max_size=12), TURNS, TIMES, st.floats(-1.0, 1.0))
def test_the_expected_end_counts_the_run_under_way_and_those_before(
    waiting: list[Turn], turn: Turn, times: RunTimes, free_at: float
) -> None:
    ends = expected_end(turn, waiting, times, 0.0, free_at)
    ahead = sum(other.rank <= turn.rank for other in waiting)
    assert ends >= max(0.0, free_at) + min(times.seconds(size, 0.0) for size in SIZES)
    assert expected_end(turn, [*waiting, Turn(0.0, 99.0)], times, 0.0, free_at) == ends  # who goes after costs nothing
    assert ends == pytest.approx(max(0.0, free_at) + times.drain_s(ahead + 1, 0.0))


def test_a_smaller_run_goes_first_when_the_larger_would_be_too_late() -> None:
    times = linear(0.005, 0.005)
    waiting = [Turn(0.0, 0.012, deadline=0.012), *(Turn(0.0, 1.0, deadline=1.0) for _ in range(3))]
    run = next_run(waiting, known({1: 0.005, 2: 0.011, 4: 0.013, 8: 0.016}), 0.0)
    assert (run.chosen, run.refused, run.ends) == ((0, 1), (), 0.011)
    assert next_run(waiting[:1], times, 0.0).chosen == (0,)


def test_when_more_wait_than_fit_the_late_ones_give_way() -> None:
    times = linear(0.01, 0.001)
    late = [Turn(0.0, 0.012, deadline=0.012) for _ in range(3)]
    run = next_run([*late, *(Turn(0.0, 1.0, deadline=1.0) for _ in range(8))], times, 0.0)
    assert run.chosen == tuple(range(3, 11)) and [i for i, _ in run.refused] == [0, 1, 2]


@pytest.mark.parametrize("sizes", [(1,), (4,), (2, 8)])
def test_any_set_of_sizes_drains_a_queue(sizes: tuple[int, ...]) -> None:
    times = RunTimes(sizes)
    waiting, served = [Turn(0.0, float(i)) for i in range(19)], 0
    while waiting:
        run = next_run(waiting, times, 0.0)
        served += len(run.chosen)
        times.record(len(run.chosen), 0.01, 0.0)
        waiting = [turn for i, turn in enumerate(waiting) if i not in run.chosen]
    assert served == 19
