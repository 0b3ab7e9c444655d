"""The network between robot and service is cut, frozen or thin, a peer does not read: the four laws."""

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from benchmarks.network_proxy import NetworkProxy
from fault_world import Outage, drive, marked_service
from recap_client.wire import pack
from service_harness import Served, eventually

_NONSENSE = pack({"type": "what is this? " * 20})  # a long question has a long answer


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with marked_service(models) as service:
        yield service


@pytest.fixture
def proxy(served: Served) -> Iterator[NetworkProxy]:
    with NetworkProxy(served.port) as between:
        yield between


@pytest.mark.parametrize("seconds", [1.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_the_network_is_cut_for(seconds: float, proxy: NetworkProxy, served: Served, tmp_path: Path) -> None:
    driven = drive(proxy.url(), Outage(proxy.cut, proxy.mend, seconds=seconds), tmp_path / "e.mcap")
    assert driven.result.starved >= 4 and driven.reconnects == 1
    eventually(lambda: served.service.connections.count == 0)


def test_a_half_open_connection(proxy: NetworkProxy, tmp_path: Path) -> None:
    """Nothing says that it is dead: no reset, no end. The deadline does, and the robot connects anew."""
    driven = drive(proxy.url(), Outage(proxy.freeze, lambda: None, held=1), tmp_path / "e.mcap")
    assert driven.reconnects >= 1 and proxy.accepted >= 2


def test_a_thin_link(proxy: NetworkProxy, tmp_path: Path) -> None:
    """Replies trickle in too late to be of use; none of them is used, and when the link is good again they are."""

    def narrow(rate: float | None) -> None:
        proxy.down_bytes_s = rate

    driven = drive(proxy.url(), Outage(lambda: narrow(100.0), lambda: narrow(None)), tmp_path / "e.mcap")
    assert driven.result.starved >= 4


def test_a_peer_that_does_not_read(served: Served, tmp_path: Path) -> None:
    """It asks and never takes an answer. The service stops reading from it, and another robot gets its chunks."""
    process, full = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", served.port))
    deaf = connect(served.url(), sock=raw, subprotocols=["recap.v1"], compression=None, proxy=None, max_queue=1)  # type: ignore[list-item]
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 500_000))

    def ask_on() -> None:
        try:
            while True:
                deaf.send(_NONSENSE)
        except (OSError, ConnectionClosed):
            full.set()

    asking = threading.Thread(target=ask_on)
    try:
        drive(
            served.url(), Outage(asking.start, lambda: None, held=0, steps=10, extra=full.is_set), tmp_path / "e.mcap"
        )
    finally:
        deaf.close_socket()
        asking.join(20)
    assert process.memory_info().rss - before < 100 << 20
    eventually(lambda: served.service.connections.count == 0)
