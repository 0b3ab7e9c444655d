"""The proxy with a network's faults: bytes and their order survive everything but a reset."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.network_proxy import NetworkProxy


@contextmanager
def echo() -> Iterator[int]:
    """A server that sends back what it gets, until the end of the stream."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve(link: socket.socket) -> None:
        with link:
            try:
                while data := link.recv(1 << 16):
                    link.sendall(data)
                link.shutdown(socket.SHUT_WR)
            except OSError:
                return  # reset by a test

    def accept() -> None:
        while True:
            try:
                link, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(link,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)  # a close alone would leave the port open as long as `accept` waits
        server.close()


@pytest.fixture(scope="module")
def target() -> Iterator[int]:
    with echo() as port:
        yield port


def connect(proxy: NetworkProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=20)


def receive(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (piece := link.recv(1 << 16)):
        data += piece
    return data


@settings(max_examples=10)
@given(pieces=st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_jitter_changes_neither_bytes_nor_their_order(target, pieces, seed) -> None:
    with NetworkProxy(target, delay_s=0.002, jitter_s=0.002, seed=seed) as proxy, connect(proxy) as link:
        for piece in pieces:
            link.sendall(piece)
        link.shutdown(socket.SHUT_WR)
        assert receive(link, 1 << 20) == b"".join(pieces), "and the end of the stream passes too"


@pytest.mark.parametrize(("direction", "ways"), [("up", 1), ("down", 1), ("both", 2)])
def test_a_round_trip_takes_at_least_the_delay_of_its_ways(target, direction, ways) -> None:
    with NetworkProxy(target, delay_s=0.06, jitter_s=0.01, direction=direction) as proxy, connect(proxy) as link:
        began = time.monotonic()
        link.sendall(b"x")
        assert receive(link, 1) == b"x"
        assert time.monotonic() - began >= ways * 0.05 - 1e-3


def test_more_than_fits_on_the_way_is_held_back_and_arrives_whole(target) -> None:
    data = bytes(range(256)) * (20 << 10)  # 5 MiB, above the 4 that may be on the way
    with NetworkProxy(target, delay_s=0.01) as proxy, connect(proxy) as link:
        threading.Thread(target=link.sendall, args=(data,), daemon=True).start()
        assert receive(link, len(data)) == data


def test_a_pause_is_silent_and_what_was_sent_arrives_after_it(target) -> None:
    with NetworkProxy(target) as proxy, connect(proxy) as link:
        link.sendall(b"before")
        assert receive(link, 6) == b"before"
        proxy.pause()
        link.sendall(b"during")
        with connect(proxy) as late:
            late.sendall(b"new")
            for end in (link, late):
                end.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    end.recv(1)
                end.settimeout(20)
            proxy.resume()
            assert receive(link, 6) == b"during" and receive(late, 3) == b"new"


def test_a_drop_resets_every_connection_and_new_ones_are_served(target) -> None:
    with NetworkProxy(target) as proxy:
        with connect(proxy) as link:
            link.sendall(b"x")
            receive(link, 1)
            proxy.drop()
            with pytest.raises(ConnectionResetError):
                receive(link, 1)
        with connect(proxy) as again:
            again.sendall(b"y")
            assert receive(again, 1) == b"y"
        assert proxy.accepted == 2


def test_a_cut_resets_and_refuses_until_it_is_mended(target) -> None:
    with NetworkProxy(target) as proxy:
        with connect(proxy) as link:
            link.sendall(b"x")
            receive(link, 1)
            proxy.cut()
            with pytest.raises(ConnectionResetError):
                receive(link, 1)
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        proxy.mend()
        with connect(proxy) as again:
            again.sendall(b"y")
            assert receive(again, 1) == b"y"


def test_what_is_frozen_stays_open_and_dead_and_new_connections_work(target) -> None:
    with NetworkProxy(target) as proxy, connect(proxy) as link:
        link.sendall(b"x")
        receive(link, 1)
        proxy.freeze()
        link.sendall(b"lost")
        with connect(proxy) as other:
            other.sendall(b"y")
            assert receive(other, 1) == b"y"
        link.settimeout(0.2)
        with pytest.raises(TimeoutError):
            link.recv(1)
        link.settimeout(20)
        proxy.drop()
        with pytest.raises(ConnectionResetError):
            receive(link, 1)


def test_a_thin_link_takes_its_time_and_loses_nothing(target) -> None:
    data = bytes(range(256)) * 8
    with NetworkProxy(target) as proxy, connect(proxy) as link:
        proxy.down_bytes_s = 10_000.0
        began = time.monotonic()
        link.sendall(data)
        assert receive(link, len(data)) == data
        assert time.monotonic() - began >= 0.8 * len(data) / 10_000.0


def test_a_side_that_leaves_takes_the_other_with_it() -> None:
    """Also when nothing is read: a reset of the target must not wait for the client's next word."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        NetworkProxy(server.getsockname()[1]) as proxy,
        connect(proxy) as link,
    ):
        there, _ = server.accept()
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        there.close()
        with suppress(ConnectionResetError):
            assert link.recv(1) == b""


def test_a_target_that_is_gone_ends_the_connection() -> None:
    with echo() as port:
        pass
    with NetworkProxy(port) as proxy, connect(proxy) as link, suppress(ConnectionResetError):
        assert link.recv(1) == b""


def test_impossible_networks_are_refused(target) -> None:
    with pytest.raises(ValueError, match=r"expected seconds >= 0, got -0\.1 and 0\.0"):
        NetworkProxy(target, delay_s=-0.1)
    with pytest.raises(ValueError, match="expected both, up or down, got 'left'"):
        NetworkProxy(target, direction="left")  # type: ignore[arg-type]
