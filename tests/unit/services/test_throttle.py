"""Log lines that strangers can cause are few, and none of them is forgotten in the count."""

import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service_harness import NativeClient, act, fetch, policy_server
from services.common.throttle import Throttle

moments = st.lists(st.tuples(st.floats(0.0, 0.7), st.sampled_from("abc")), max_size=60)


@given(moments)
def test_every_event_is_written_or_counted_and_never_two_of_a_kind_in_a_second(events) -> None:  # type: ignore[no-untyped-def]
    now = 0.0
    throttle = Throttle(1.0, lambda: now)
    written: dict[str, list[float]] = {kind: [] for kind in "abc"}
    told = dict.fromkeys("abc", 0)
    for wait, kind in events:
        now += wait
        more = throttle.passes(kind)
        if more is not None:
            written[kind].append(now)
            told[kind] += 1 + more.get("suppressed", 0)
            assert more.get("suppressed") != 0
    now += 2.0
    for kind in "abc":
        assert all(later - earlier >= 1.0 for earlier, later in zip(written[kind], written[kind][1:]))  # noqa: B905
        more = throttle.passes(kind)
        assert more is not None
        assert told[kind] + more.get("suppressed", 0) == sum(other == kind for _, other in events)


def test_a_robot_that_is_wrong_at_control_rate_writes_a_line_a_second(models: Path) -> None:
    with policy_server(models) as served, capture_logs() as logs:
        began = time.monotonic()
        for _ in range(20):
            assert fetch(served.http("/act"), data=b"{}")[0] == 422
            assert fetch(served.http("/act"), data=b"[]")[0] == 400
        most = 1 + time.monotonic() - began
    lines = [entry for entry in logs if entry["event"] == "request refused"]
    for code in ("bad_observation", "bad_message"):
        mine = [line for line in lines if line["code"] == code]
        assert 1 <= len(mine) <= most and "suppressed" not in mine[0]
        assert sum(1 + line.get("suppressed", 0) for line in mine) <= 20


def test_an_engine_that_fails_at_control_rate_writes_few_tracebacks(models: Path) -> None:
    """Every robot is told of every failure; the log of the first in a second, and of how many more there were."""
    with policy_server(models) as served, capture_logs() as logs, NativeClient(served.url()) as client:
        served.engine.failure = RuntimeError("device lost")
        began = time.monotonic()
        for number in range(20):
            assert client.ask(act(served.service.spec.robot, number))["code"] == "internal"
        most = 1 + time.monotonic() - began
    for event in ("act failed", "request failed"):
        mine = [line for line in logs if line["event"] == event]
        assert 1 <= len(mine) <= most
        assert 1 <= sum(1 + line.get("suppressed", 0) for line in mine) <= 20
