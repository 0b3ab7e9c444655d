"""A connection that is lost again and again leaves nothing behind, on either side: both run in this process."""

import threading
from pathlib import Path

import psutil
import pytest

from benchmarks.network_proxy import NetworkProxy
from fault_world import SPEC, marked_service
from recap_client.session import ServiceUnavailable, Session
from service_harness import Served, eventually


def _open() -> tuple[int, int]:
    return psutil.Process().num_fds(), threading.active_count()


def _settled(service: Served) -> bool:
    gauge = service.service.metrics.sessions.collect()[0].samples[0].value
    return bool(service.service.connections.count == 1 and gauge == 1)


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_reconnects(times: int, models: Path) -> None:
    with marked_service(models) as service, NetworkProxy(service.port) as proxy:
        session = Session(proxy.url(), "policy", SPEC, backoff_s=(0.001, 0.01))
        before = (0, 0)
        try:
            for count in range(times):
                proxy.drop()
                eventually(lambda: _answers(session), timeout=60)
                if count == times // 10:
                    eventually(lambda: _settled(service), timeout=60)
                    before = _open()
            assert session.reconnects >= times
            eventually(lambda: _settled(service), timeout=60)
            eventually(lambda: all(now <= then + 2 for now, then in zip(_open(), before, strict=True)))
        finally:
            session.close()
        eventually(lambda: service.service.connections.count == 0)


def _answers(session: Session) -> bool:
    try:
        return bool(session.call({"type": "ping", "t": 0.0}, deadline_s=30.0)["type"] == "pong")
    except ServiceUnavailable:
        return False


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_sessions_that_come_and_go(times: int, models: Path) -> None:
    with marked_service(models) as service:
        before = (0, 0)
        for count in range(times):
            Session(service.url(), "policy", SPEC).close()
            if count == times // 10:
                eventually(lambda: service.service.connections.count == 0)
                before = _open()
        eventually(lambda: service.service.connections.count == 0)
        eventually(lambda: all(now <= then + 2 for now, then in zip(_open(), before, strict=True)))
