"""Laws of the small parts: chunk queue, safety limits, takeover rule, pace."""

import subprocess
import sys
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recap_client.chunks import ChunkQueue
from recap_client.intervention import TakeoverRule
from recap_client.pace import Caller, Pace
from recap_client.robots.metaworld import metaworld_spec
from recap_client.safety import SafetyLimits, UnsafeAction
from toy_robot import TOY_SPEC


@given(st.integers(1, 10), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=20))
def test_every_action_belongs_to_its_own_step(execute: int, replies: list[tuple[int, int]]) -> None:
    """Rows hold the step they are meant for; whatever the order of replies and delays, only that row comes out."""
    queue, step, newest = ChunkQueue(execute), 0, -1
    for number, (gap, delay) in enumerate(replies):
        step += gap
        asked = max(0, step - delay)
        queue.put(np.arange(asked, asked + 8, dtype=np.float32)[:, None], asked, number)
        newest = max(newest, asked)
        due = queue.at(step)
        if due is None:
            assert step >= newest + 8
        else:
            assert due.action[0] == step
        assert queue.wants_chunk(newest + execute) and not queue.wants_chunk(newest)


def test_queue_starts_empty_and_clears() -> None:
    queue = ChunkQueue(4)
    assert queue.at(0) is None and queue.wants_chunk(0)
    queue.put(np.zeros((8, 1), np.float32), 0, 0)
    queue.clear()
    assert queue.at(0) is None and queue.wants_chunk(0)
    with pytest.raises(ValueError, match="at least 1"):
        ChunkQueue(0)


def test_a_chunk_shorter_than_execute_is_asked_for_when_it_ends() -> None:
    queue = ChunkQueue(4)
    queue.put(np.zeros((2, 1), np.float32), 0, 0)
    assert not queue.wants_chunk(1) and queue.wants_chunk(2)


@given(st.lists(hnp.arrays(np.float32, 4, elements=st.floats(-10, 10, width=32)), min_size=1, max_size=6))
def test_safe_actions_stay_inside_limits_and_rate(actions: list[np.ndarray]) -> None:
    limits = SafetyLimits(metaworld_spec(), max_change=0.25)
    last = None
    for action in actions:
        safe = limits(action)
        assert safe.dtype == np.float32 and (np.abs(safe) <= 1).all()
        assert last is None or (np.abs(safe - last) <= 0.25 + 1e-6).all()
        last = safe
    inside = np.clip(actions[0], -1, 1)
    np.testing.assert_array_equal(SafetyLimits(metaworld_spec())(inside), inside)


@pytest.mark.parametrize("action", [np.array([np.nan]), np.array([np.inf]), np.zeros(2), np.zeros((1, 1))])
def test_unsafe_actions_are_refused(action: np.ndarray) -> None:
    with pytest.raises(UnsafeAction, match="expected"):
        SafetyLimits(TOY_SPEC)(action)


def test_takeover_waits_a_window_and_is_final() -> None:
    watcher = TakeoverRule(1.0, rise=0.015, window_s=0.4).watcher(seed=0)
    assert not any(watcher.see(t, -0.9) for t in (0.0, 0.2))
    assert watcher.see(0.4, -0.9) and watcher.see(0.6, -0.1)


@given(st.integers(0, 10**6))
def test_a_rising_value_is_left_alone_and_the_draw_follows_the_seed(seed: int) -> None:
    rule = TakeoverRule(0.5)
    assert rule.watcher(seed).watching == rule.watcher(seed).watching
    watcher = TakeoverRule(1.0).watcher(seed)
    assert not any(watcher.see(0.2 * k, -1 + 0.02 * k) for k in range(40))


def test_the_share_of_watched_episodes_is_the_probability() -> None:
    watched = [TakeoverRule(0.3).watcher(seed).watching for seed in range(2000)]
    assert 0.26 < np.mean(watched) < 0.34


def test_pace_counts_missed_steps_and_does_not_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("recap_client.pace.time.monotonic", lambda: now[0])
    monkeypatch.setattr("recap_client.pace.time.sleep", lambda s: now.__setitem__(0, now[0] + s))
    pace, starts = Pace(0.05, realtime=True), []
    for step, work in enumerate([0.01, 0.18, 0.01, 0.01]):
        pace.wait(step)
        starts.append(round(now[0] - 100.0, 6))
        now[0] += work
        pace.end(step)
    assert pace.missed == 1
    assert starts == [0.0, 0.05, 0.23, 0.28], "absolute deadlines, moved on once by the lateness"


def test_caller_raises_what_the_call_raised_and_goes_on() -> None:
    caller: Caller[int] = Caller("t")
    caller.start(3, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        caller.result(None)
    assert not caller.busy and caller.result(0.0) is None
    caller.start(4, lambda: 7)
    assert caller.result(None) == (4, 7)
    caller.close()


def test_a_reply_in_the_instant_after_the_wait_is_a_reply() -> None:
    class JustAfter(Future[str]):
        def result(self, timeout: float | None = None) -> str:
            if not self.done():
                self.set_result("chunk")
                raise TimeoutError  # the wait ran out, and then it was there
            return super().result(timeout)

    caller: Caller[str] = Caller("t")
    caller._pending = (7, JustAfter())
    assert caller.result(0.0) == (7, "chunk") and not caller.busy


def test_importing_the_client_loads_neither_simulator_nor_torch_and_sets_nothing() -> None:
    code = (
        "import os, sys; before = dict(os.environ)\n"
        "import recap_client.cli, recap_client.robots.metaworld, recap_client.robots.expert, recap_client.fleet\n"
        "loaded = {'torch', 'mujoco', 'metaworld', 'gymnasium', 'recap_model'} & set(sys.modules)\n"
        "assert not loaded, loaded\nassert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
