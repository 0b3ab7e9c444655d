"""Peers that never finish what they begin, and peers in great numbers: bounded, counted, no trouble for the others."""

import asyncio
import contextlib
import resource
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from websockets.exceptions import InvalidStatus

from repository_factory import robot_spec
from service_harness import NativeClient, Served, act, eventually, policy_server
from services.common.doors import Doors
from services.common.server import bind, make_server
from services.common.settings import Access, PolicySettings, Tls
from services.policy.app import create_app
from services.policy.pipeline import load_policy_engine

SPEC = robot_spec()
PATIENCE_S = 0.4
HEAD = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
FRAME = b"\x82\xfe\x10\x00\x00\x00\x00\x00" + b"\x80" * 100  # of a 4 KiB message


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with policy_server(models, access=Access(request_s=PATIENCE_S)) as server:
        yield server


def refused(served: Served, reason: str) -> float:
    return float(served.service.metrics.refused.labels(reason)._value.get())


def dial(served: Served, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), 20, (source, 0))


def until_closed(link: socket.socket) -> bytes:
    """Everything that still comes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := link.recv(1 << 16):
            data += piece
    return data


def answered(link: socket.socket) -> bytes:
    """The reply to a first, whole request, after which the connection stays open."""
    link.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    data = b""
    while not data.endswith(b"OK\n") and (piece := link.recv(4096)):
        data += piece
    return data


@pytest.mark.parametrize(
    ("sent", "part"),
    [
        (b"", "head"),
        (b"GET /livez HT", "head"),
        (HEAD, "head"),
        (HEAD + b"\r\n", "body"),
        (HEAD + b"\r\n{", "body"),
        (b"GET /act HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-Web", "head"),
    ],
)
def test_a_request_that_does_not_end_is_ended(served: Served, sent: bytes, part: str) -> None:
    before = refused(served, "slow")
    with dial(served) as link:
        link.sendall(sent)
        reply = until_closed(link)
    assert reply.startswith(b"HTTP/1.1 408 Request Timeout\r\n"), reply
    assert reply.endswith(f"expected the {part} of a request within 0.4 s, got a part of it or none".encode())
    assert refused(served, "slow") == before + 1
    assert served.service.connections.count == 0 and served.get("/livez") == (200, "OK\n")


@pytest.mark.parametrize("sent", [b"", b"GET /li", HEAD + b"\r\n{"])
def test_so_is_one_behind_a_request_that_was_answered(served: Served, sent: bytes) -> None:
    with dial(served) as link:
        assert b"200 OK" in answered(link)
        link.sendall(sent)
        assert b" 408 " in until_closed(link)


def test_a_byte_now_and_then_buys_no_time(served: Served) -> None:
    with dial(served) as link:

        def ended() -> bool:
            try:
                link.sendall(b"G")
            except OSError:
                return True
            time.sleep(0.05)
            return False

        eventually(ended, timeout=20)


def test_half_a_frame_is_ended_by_the_pings(served: Served) -> None:
    config = served.running.server.config
    before = config.ws_ping_interval, config.ws_ping_timeout
    config.ws_ping_interval, config.ws_ping_timeout = 0.2, 0.2
    client = NativeClient(served.url())
    try:
        with NativeClient(served.url()) as idle:
            client.socket.socket.sendall(FRAME)
            eventually(lambda: served.service.connections.count == 1)
            time.sleep(3 * PATIENCE_S)
            assert idle.ask(act(SPEC))["type"] == "chunk", "one that only says nothing is left alone"
    finally:
        config.ws_ping_interval, config.ws_ping_timeout = before
        client.socket.close_socket()


def test_a_peer_that_takes_no_answer_is_let_go(served: Served) -> None:
    """More replies than the kernel holds, then the end of the connection: it must not wait for them to be read."""
    before = refused(served, "slow")
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.settimeout(20)
        link.connect(("127.0.0.1", served.port))
        ours = link.getsockname()

        def there() -> list[Any]:
            open_ = served.running.server.server_state.connections
            return [c for c in list(open_) if c.client == ours]

        eventually(there)
        link.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
        eventually(lambda: not there())
    assert refused(served, "slow") == before + 1


def test_tls_is_no_way_around(models: Path, tmp_path: Path) -> None:
    new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=service"
    files = ["-keyout", "service.key", "-out", "service.pem", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", *new.split(), *files], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    context = ssl.create_default_context(cafile=tmp_path / "service.pem")
    pair = Tls(tmp_path / "service.pem", tmp_path / "service.key")
    with policy_server(models, tls=pair, access=Access(request_s=PATIENCE_S)) as served:
        with dial(served) as silent:
            assert until_closed(silent) == b"", "no handshake, no words"
        with context.wrap_socket(dial(served), server_hostname="127.0.0.1") as link:
            link.sendall(HEAD)
            assert b" 408 " in until_closed(link)


class Crowd:
    """Open connections of one address."""

    def __init__(self, served: Served, stack: ExitStack) -> None:
        self._served, self._stack = served, stack
        self.links: list[socket.socket] = []

    def grow(self, count: int, source: str = "127.0.0.1") -> None:
        wanted = len(self._served.running.server.server_state.connections) + count
        self.links += [self._stack.enter_context(dial(self._served, source)) for _ in range(count)]
        eventually(lambda: len(self._served.running.server.server_state.connections) == wanted)


def test_a_crowd_of_one_address_keeps_no_other_out(models: Path) -> None:
    access = Access(address_connections=5, max_connections=8, request_s=60.0)
    with policy_server(models, access=access) as served, ExitStack() as stack:
        crowd = Crowd(served, stack)
        crowd.grow(5)
        with dial(served) as link:
            reply = until_closed(link)  # told at the latest when it is closed
        assert reply.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"\r\nRetry-After: 1\r\n" in reply
        assert reply.endswith(b"5 connections are open from 127.0.0.1; close one first")
        with pytest.raises(InvalidStatus) as refusal:
            NativeClient(served.url())
        assert refusal.value.response.status_code == 503 and b"close one first" in refusal.value.response.body
        assert refused(served, "connections") == 2
        with dial(served, "127.0.0.2") as other:
            assert b"200 OK" in answered(other)

        eventually(lambda: len(served.running.server.server_state.connections) == 5)
        crowd.grow(3, "127.0.0.3")
        with dial(served, "127.0.0.4") as link:
            assert until_closed(link).endswith(b"8 connections are open; no room for another")
        crowd.links[0].close()
        eventually(lambda: len(served.running.server.server_state.connections) == 7)
        with NativeClient(served.url()) as client:
            assert client.ask(act(SPEC))["type"] == "chunk"


def test_never_more_connections_than_files() -> None:
    """Whatever is asked for: a service that cannot open its log or its next model is worth nothing."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def taken(access: Access) -> int:
        there = [SimpleNamespace(client=(f"192.0.2.{n % 250}", n)) for n in range(2000)]
        full = (n for n in range(2000) if Doors(access, there[:n], print).why_not("192.0.2.1") is not None)
        return next(full)

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, before[1]))
        assert taken(Access()) == taken(Access(max_connections=1000)) == 272
        assert taken(Access(max_connections=20)) == 20
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
        assert taken(Access()) == 2 * (512 + 64) and taken(Access(max_sessions=10)) == 2 * (10 + 64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("name", ["request_s", "max_connections", "address_connections"])
def test_bounds_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected a number above 0, got 0$"):
        Access(**{name: 0})


@contextlib.contextmanager
def uvloop_server(models: Path, access: Access) -> Iterator[Served]:
    """As `recap serve` runs it."""
    engine: Any = load_policy_engine(models, 1.0, "onnxruntime")
    app = create_app(engine, PolicySettings(access=access))
    sock, server = bind("127.0.0.1", 0), make_server(app, app.state.limits)
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[sock]), loop_factory=uvloop.new_event_loop)
    )
    thread.start()
    try:
        eventually(lambda: server.started)
        running: Any = SimpleNamespace(server=server, port=sock.getsockname()[1])
        yield Served(running, app.state.service, engine)
    finally:
        server.should_exit = True
        thread.join(20)


def test_all_of_it_on_uvloop(models: Path) -> None:
    access = Access(address_connections=2, request_s=PATIENCE_S)
    with uvloop_server(models, access) as served, NativeClient(served.url()) as client:
        with dial(served) as link:
            link.sendall(HEAD)
            eventually(lambda: len(served.running.server.server_state.connections) == 2)
            with dial(served) as third:
                assert until_closed(third).endswith(b"close one first")
            assert b" 408 " in until_closed(link)
        assert client.ask(act(SPEC))["type"] == "chunk"
