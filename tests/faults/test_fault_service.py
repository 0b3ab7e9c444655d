"""The service dies, its engine raises or hangs, the critic is gone: the robot is held, goes on by itself, executes
nothing stale and loses no frame of its log (the four laws of `fault_world`)."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.network_proxy import NetworkProxy
from fault_world import ChildService, Outage, drive, marked_service
from service_harness import Served, critic_server, eventually


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with marked_service(models) as service:
        yield service


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_service_is_killed_and_restarted(models: Path, tmp_path: Path) -> None:
    with ChildService(models, _free_port()) as service:
        outage = Outage(service.kill, service.start_later)
        driven = drive(f"ws://127.0.0.1:{service.port}/act", outage, tmp_path / "e.mcap")
    assert driven.result.starved >= 4 and driven.reconnects >= 1


def test_the_engine_raises(served: Served, tmp_path: Path) -> None:
    def fail(failure: Exception | None) -> None:
        served.engine.failure = failure

    outage = Outage(lambda: fail(RuntimeError("out of memory")), lambda: fail(None))
    driven = drive(served.url(), outage, tmp_path / "e.mcap", deadline_s=10.0)
    assert driven.result.starved >= 4
    assert driven.reconnects == 0, "an answered error keeps the connection"


def test_the_engine_hangs(served: Served, tmp_path: Path) -> None:
    outage = Outage(served.engine.gate.clear, served.engine.gate.set)
    try:
        driven = drive(served.url(), outage, tmp_path / "e.mcap")
    finally:
        served.engine.gate.set()
    assert driven.result.starved >= 4
    eventually(lambda: served.service.connections.count == 0)


def test_the_critic_is_gone(models: Path, tmp_path: Path) -> None:
    """It costs its values and nothing else: the robot acts on, and values come again afterwards."""
    with (
        critic_server(models) as critic,
        NetworkProxy(critic.port) as proxy,
        marked_service(models, critic_url=proxy.url("/value")) as service,
    ):
        judged, acted = [0, 0], [0, 0]

        def cut() -> None:
            proxy.cut()
            judged[0], acted[0] = len(critic.engine.calls), outage.acted

        def mend() -> None:
            judged[1], acted[1] = len(critic.engine.calls), outage.acted
            proxy.mend()

        outage = Outage(cut, mend, held=0, steps=20, extra=lambda: len(critic.engine.calls) > judged[1] + 2)
        driven = drive(service.url(), outage, tmp_path / "e.mcap", critic_url=proxy.url("/value"), deadline_s=10.0)
    assert judged[0] > 0 and judged[1] - judged[0] <= 2, "at most what was under way"
    assert driven.reconnects == 0 and driven.result.values
    assert acted[1] - acted[0] >= 10, "most of the 20 steps without it"
