"""Laws of the chunk strategies, of what they measure, and of simulated delays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recap_client.chunks import STRATEGIES, ChunkQueue, EnsembleQueue, queue_for
from recap_client.delay import Delay, LateCaller
from recap_client.episode import LoopSettings
from recap_client.pace import Caller
from recap_client.rtc import WINDOW, DelayEstimate, seam_error
from recap_client.spec import RobotSpec
from toy_robot import TOY_SPEC

HEIGHT = 8
REPLIES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=20)
PAIR = hnp.arrays(np.float32, (2, 1), elements=st.floats(-1, 1, width=32))


def ramp(start: int) -> np.ndarray:
    """A chunk whose rows hold the control step they are meant for."""
    return np.arange(start, start + HEIGHT, dtype=np.float32)[:, None]


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(replies=REPLIES)
def test_every_strategy_gives_each_step_its_own_rows(strategy, replies) -> None:
    """Chunks that agree about every step: whatever their order, delays and overlaps, only that row comes out."""
    queue, step, newest = queue_for(strategy, 4), 0, -1
    for number, (gap, delay) in enumerate(replies):
        step += gap
        asked = max(0, step - delay)
        queue.put(ramp(asked), asked, number)
        newest = max(newest, asked)
        due, rest = queue.at(step), queue.rest(step)
        assert (due is None) == (rest is None) == (step >= newest + HEIGHT)
        if due is not None and rest is not None:
            assert due.action[0] == pytest.approx(step) and due.action.dtype == np.float32
            np.testing.assert_array_equal(rest, ramp(newest)[step - newest :])


def test_a_strategy_forgets_on_clear_and_an_unknown_one_is_refused() -> None:
    for strategy in STRATEGIES:
        queue = queue_for(strategy, 4)
        queue.put(ramp(0), 0, 0)
        queue.clear()
        assert queue.at(0) is None and queue.rest(0) is None and queue.wants_chunk(0)
    with pytest.raises(ValueError, match="chunks: expected one of switch, latest, ensemble, rtc, got 'smooth'"):
        queue_for("smooth", 4)  # type: ignore[arg-type]


def test_when_each_strategy_asks() -> None:
    first = {"switch": 4, "rtc": 4, "latest": 1, "ensemble": 1}
    for strategy in STRATEGIES:
        queue = queue_for(strategy, 4)
        queue.put(ramp(10), 10, 0)
        assert next(step for step in range(10, 30) if queue.wants_chunk(step)) == 10 + first[strategy]


@given(st.integers(1, 10), st.integers(0, 12))
def test_a_slow_service_is_asked_before_the_reserve_is_too_short(execute, delay) -> None:
    queue = ChunkQueue(execute)
    queue.put(ramp(0), 0, 0)
    asks = next(step for step in range(30) if queue.wants_chunk(step, delay))
    assert 1 <= asks <= min(execute, HEIGHT)
    if delay < HEIGHT:
        assert asks + delay <= HEIGHT, "the last row runs in the step before the reply"


def test_an_ensemble_is_acts_weighted_mean_oldest_first() -> None:
    queue = EnsembleQueue(decay=0.5)
    for start, value in ((0, 1.0), (2, 3.0), (3, 7.0)):
        queue.put(np.full((HEIGHT, 2), value, np.float32), start, start)
    weights = np.exp(-0.5 * np.arange(3))
    due = queue.at(4)
    assert due is not None and due.chunk == 3
    np.testing.assert_allclose(due.action, (weights @ [1, 3, 7]) / weights.sum(), rtol=1e-6)
    last = queue.at(9)  # the oldest has ended
    assert last is not None
    np.testing.assert_allclose(last.action, (weights[:2] @ [3, 7]) / weights[:2].sum(), rtol=1e-6)


@given(PAIR, PAIR)
def test_an_ensemble_never_leaves_what_its_chunks_span(one, other) -> None:
    queue = EnsembleQueue()
    for number, chunk in enumerate((one, other)):
        queue.put(chunk, number, number)
    due = queue.at(1)
    assert due is not None and min(one[1], other[0]) - 1e-6 <= due.action[0] <= max(one[1], other[0]) + 1e-6


@given(hnp.arrays(np.float32, 4, elements=st.floats(-3, 3, width=32)), hnp.arrays(np.float32, 4, elements=st.floats(-3, 3, width=32)))  # fmt: skip # noqa: E501
def test_the_seam_is_a_distance_within_the_limits(one, other) -> None:
    spec = RobotSpec(**{**TOY_SPEC.__dict__, "action": TOY_SPEC.action[:1]})
    a, b = one[:1], other[:1]
    assert seam_error(a, a, spec) == 0 and seam_error(a, b, spec) == seam_error(b, a, spec)
    assert 0 <= seam_error(a, b, spec) <= 1
    low, high = np.float32([-0.2]), np.float32([0.2])
    assert seam_error(low, high, spec) == pytest.approx(1) and seam_error(high, 10 * high, spec) == pytest.approx(0)


def test_the_expected_delay_is_the_largest_of_the_last_and_forgets_a_spike() -> None:
    delays = DelayEstimate(period_s=0.05)
    assert delays.expected == delays.typical == 0
    for took, latency in ((3, 0.15), (9, 0.45), (3, 0.15)):
        delays.add(took, latency)
    assert delays.expected == 9 and delays.typical == 3, "conservative for what is held, the middle for waiting"
    for _ in range(WINDOW):
        delays.add(1, 0.02)
    assert delays.expected == 1 and delays.typical == 0, "20 ms could have been waited for"


@given(st.floats(0, 0.4), st.floats(0, 0.2), st.integers(0, 2**32), st.floats(0, 1))
def test_a_late_reply_comes_when_its_robot_time_has_passed_and_not_before(delay_s, jitter_s, seed, within) -> None:
    delay, period = Delay(delay_s, jitter_s), 0.05
    lag = delay.draw(np.random.default_rng(seed))
    assert max(0, delay_s - jitter_s) <= lag <= delay_s + jitter_s
    caller: Caller[int] = Caller("t")
    late = LateCaller(caller, delay, period, np.random.default_rng(seed), lambda value, lag_s: (value, lag_s))  # type: ignore[arg-type, return-value]
    late.start(5, lambda: 7)
    step = 5
    while (done := late.result(step, within)) is None:
        assert late.busy and (step + within - 5) * period < lag
        step += 1
    assert done == (5, (7, lag)) and not late.busy and late.result(step, within) is None
    assert (step + within - 5) * period >= lag - 1e-6
    late.close()


def test_a_failed_call_is_not_held_back_and_frees_the_caller() -> None:
    caller: Caller[int] = Caller("t")
    late = LateCaller(caller, Delay(1.0), 0.05, np.random.default_rng(0), lambda value, _: value)
    late.start(0, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        late.result(0, 0.0)
    assert not late.busy
    late.close()


def test_impossible_delays_are_refused() -> None:
    with pytest.raises(ValueError, match="delay_s, jitter_s: expected seconds >= 0, got -1 and 0"):
        Delay(-1)
    with pytest.raises(ValueError, match="expected realtime=False with a simulated delay"):
        LoopSettings(realtime=True, delay=Delay(0.1))
