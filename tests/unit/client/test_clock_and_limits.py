"""The clock offset from ordinary replies, and limits of change by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recap_client.clock import ClockOffset
from recap_client.safety import SafetyLimits
from recap_client.spec import ActionDim, Camera, RobotSpec, SpecError, StateDim

seconds = st.floats(0, 2)


@given(st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=80), st.floats(-1e6, 1e6))
def test_the_true_offset_is_within_the_error_and_the_quickest_reply_wins(
    ways: list[tuple[float, float, float]], offset: float
) -> None:
    clock, now = ClockOffset(), 1000.0
    for there, served, back in ways:
        received = now + there + served + back
        clock.add(now, received, served, now + there + served + offset)
        now = received
        assert clock.best is not None and abs(clock.best.offset_s - offset) <= clock.best.error_s + 1e-6
    newest = ways[-64:]
    assert clock.best is not None
    assert clock.best.error_s == pytest.approx(min(there + back for there, _, back in newest) / 2, abs=1e-6)


def test_a_clock_that_drifts_is_followed_once_the_old_replies_are_gone() -> None:
    clock = ClockOffset(window=8)
    clock.add(0.0, 0.0, 0.0, 50.0)  # the best reply there can be, but old
    for step in range(1, 10):
        clock.add(step, step + 0.02, 0.0, step + 0.01 + 60.0)
    assert clock.best is not None and clock.best.offset_s == pytest.approx(60.0)
    clock.clear()
    assert clock.best is None


@pytest.mark.parametrize("served", [-0.1, 0.5])
def test_times_that_contradict_each_other_are_left_out(served: float) -> None:
    clock = ClockOffset()
    clock.add(1.0, 1.4, served, 9.0)
    assert clock.best is None


SPEC = RobotSpec("arm", (Camera("eye", 8, 8),), (StateDim("x", "m"),),
                 tuple(ActionDim(name, "rad", -10, 10) for name in ("pan", "lift", "grip")), 50.0)  # fmt: skip


@given(st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=2, max_size=10))
def test_only_the_named_dimensions_are_held_back(actions: list[list[float]]) -> None:
    limits = SafetyLimits(SPEC, {"lift": 0.5, "pan": 2.0})
    last = None
    for action in actions:
        safe = limits(np.array(action, np.float32))
        assert (np.abs(safe) <= 10).all() and safe[2] == np.float32(np.clip(action[2], -10, 10))
        if last is not None:
            assert (np.abs(safe - last)[:2] <= np.array([2.0, 0.5]) + 1e-5).all()
        last = safe


def test_changes_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(SpecError, match=r"expected names of \['pan', 'lift', 'grip'\], got \['elbow'\]"):
        SafetyLimits(SPEC, {"elbow": 1.0})
    with pytest.raises(SpecError, match=r"expected one or 3 positive numbers, got 0\.0"):
        SafetyLimits(SPEC, 0.0)
    with pytest.raises(SpecError, match=r"got \[1\.0, 2\.0\]"):
        SafetyLimits(SPEC, np.array([1, 2], np.float32))
