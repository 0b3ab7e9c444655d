"""The short way of large binary messages: the same conversation as uvicorn's own class has, whatever the peer sends and
however the network cuts it."""

import asyncio
import contextlib
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import uvicorn
import uvloop
from hypothesis import example, given, settings
from hypothesis import strategies as st
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Frame, Opcode
from websockets.sync.client import ClientConnection, connect

from services.common import ws_protocol
from services.common.server import bind
from services.common.ws_frames import Frames
from services.common.ws_protocol import RobotWebSocket

LIMIT = 300  # bytes of a message, where a stream may break the rules
HANDSHAKE = (
    b"GET /act HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
HEADER_OF_A_GIGABYTE = b"\x82\xff" + struct.pack("!Q", 1 << 30) + b"mask"


def frame(first: int, payload: bytes, *, masked: bool = True, form: int | None = None, claim: int = 0) -> bytes:
    """first: its FIN, extension bits and opcode. form: 126 or 127 for a length longer than it need be. claim: bytes
    that the header announces beyond the payload."""
    size = len(payload) + claim
    form = form or (size if size < 126 else 126 if size < 1 << 16 else 127)
    length = {126: struct.pack("!H", size), 127: struct.pack("!Q", size)}.get(form, b"")
    key = b"\x01\x80\x7f\xfe"
    body = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload)) if masked else payload
    return bytes([first, form | (0x80 if masked else 0)]) + length + (key if masked else b"") + body


PAYLOADS = st.binary(max_size=40) | st.sampled_from([b"", b"a" * 125, b"b" * 126, b"c" * LIMIT, b"d" * (LIMIT + 1)])
BINARY = st.builds(lambda data: frame(0x82, data), st.binary(max_size=40) | st.just(b"e" * LIMIT))
LAWFUL = st.one_of(
    BINARY,
    st.builds(lambda data: frame(0x82, data, form=127), st.binary(max_size=9)),
    st.builds(lambda data: frame(0x81, data.encode()), st.text(max_size=9)),
    st.builds(lambda opcode, data: frame(opcode, data), st.sampled_from([0x89, 0x8A]), st.binary(max_size=125)),
    st.builds(
        lambda parts, ping: (
            frame(0x02, parts[0]) + ping + b"".join(frame(0x00, part) for part in parts[1:]) + frame(0x80, b".")
        ),
        st.lists(st.binary(max_size=90), min_size=1, max_size=3),
        st.sampled_from([b"", frame(0x89, b"still there?")]),
    ),
)
ANY = st.one_of(
    LAWFUL,
    st.builds(frame, st.integers(0, 255), PAYLOADS),
    st.builds(lambda data: frame(0x82, data, masked=False), PAYLOADS),
    st.builds(lambda data: frame(0x82, data, claim=1000), PAYLOADS),
    st.builds(lambda code: frame(0x88, struct.pack("!H", code) + b"bye"), st.integers(990, 1015)),
    st.binary(max_size=20),
)
STREAMS = st.lists(LAWFUL, max_size=5).flatmap(
    lambda begun: st.lists(ANY, max_size=4).map(lambda rest: b"".join([*begun, *rest]))
)


class Wire(asyncio.Transport):
    """A socket of which a test decides what comes in, piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: Any = None
        self.written = bytearray()
        self.closed = self.ended = self.paused = False

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def write(self, data: Any) -> None:
        if not self.closed and not self.ended:  # as real ones do
            self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        assert not self.ended
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def receive(self, data: bytes) -> None:
        if self.closed or not data:
            return
        if isinstance(self.protocol, asyncio.Protocol):
            self.protocol.data_received(data)
            return
        while data:
            room = self.protocol.get_buffer(-1)
            count = min(len(room), len(data))
            room[:count] = data[:count]
            self.protocol.buffer_updated(count)
            data = data[count:]


@dataclass(frozen=True)
class Heard:
    """What the app was given, and what the peer was. unread: what is kept of it although the app has left. closed: the
    peer sees an end."""

    events: list[dict[str, Any]]
    unread: int
    replies: bytes
    closed: bool


def connected(kind: type[WebSocketsSansIOProtocol], app: Any) -> tuple[Wire, WebSocketsSansIOProtocol]:
    """A connection whose handshake has come."""
    config = uvicorn.Config(app, ws=kind, ws_max_size=LIMIT, ws_per_message_deflate=False, ws_ping_interval=None,
                            log_config=None)  # fmt: skip
    config.load()
    wire, protocol = Wire(), kind(config, ServerState(), {})
    protocol.connection_made(wire)
    protocol.data_received(HANDSHAKE)
    wire.set_protocol(protocol)
    return wire, protocol


async def conversation(kind: type[WebSocketsSansIOProtocol], pieces: list[bytes], early: bytes = b"") -> Heard:
    """early: what comes before the app has accepted."""
    events: list[dict[str, Any]] = []
    accept = asyncio.Event()

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await accept.wait()
        await send({"type": "websocket.accept"})
        while (event := await receive())["type"] == "websocket.receive":
            events.append(event)
        events.append(event)

    wire, protocol = connected(kind, app)
    wire.receive(early)
    accept.set()
    await settled()
    for piece in pieces:
        wire.receive(piece)
    await settled()
    for task in protocol.tasks:
        task.cancel()
    return Heard(events, protocol.queue.qsize(), bytes(wire.written), wire.closed or wire.ended)


async def settled() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    marks = [0, *sorted(mark % (len(data) + 1) for mark in at), len(data)]
    return [data[start:end] for start, end in pairwise(marks) if start < end]


@settings(max_examples=80, deadline=None)
@given(
    STREAMS, st.lists(st.integers(0, 4000), max_size=8), st.lists(BINARY, max_size=2).map(b"".join), st.integers(0, 9)
)
@example(frame(0x82, b"x" * LIMIT) + frame(0x82, b"y" * (LIMIT + 1)), [], b"", 0)
@example(frame(0x02, b"x" * 200) + frame(0x82, b"y"), [], b"", 0)
@example(frame(0x02, b"x" * 200) + frame(0x80, b"y" * 200), [3, 50], b"", 0)
@example(frame(0x88, b"") + frame(0x82, b"late"), [], b"", 0)
@example(frame(0x81, b"\xff\xfe") + frame(0x82, b"late") + frame(0x89, b""), [], b"", 0)
@example(frame(0xC2, b"compressed"), [], b"", 0)
@example(b"\x82", [], frame(0x82, b"early"), 2)
def test_any_stream_cut_anywhere_is_the_librarys_conversation(
    stream: bytes, marks: list[int], early: bytes, held_back: int
) -> None:
    plain = asyncio.run(conversation(WebSocketsSansIOProtocol, [bytes([byte]) for byte in early + stream]))
    first = len(early) - min(held_back, len(early))
    pieces = cut(early[first:] + stream, marks)
    assert asyncio.run(conversation(RobotWebSocket, pieces, early[:first])) == plain


def test_what_comes_after_the_apps_goodbye_does_not_hide_the_peers() -> None:
    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 1001})

    async def test() -> None:
        wire, protocol = connected(RobotWebSocket, app)
        await settled()
        for _ in range(3):
            wire.receive(frame(0x82, b"a frame that was under way"))
        assert not wire.paused and not wire.closed
        wire.receive(frame(0x88, struct.pack("!H", 1001)))
        assert wire.closed and protocol.queue.qsize() == 1, "the disconnect alone"

    asyncio.run(test())


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 125, 126, 65_535, 65_536, 150_000]), min_size=1, max_size=5),
    st.lists(st.sampled_from([1, 5, 14, 1000, 30_000, 40_000, 200_000]), min_size=1, max_size=9),
)
def test_large_messages_come_whole_and_in_order(sizes: list[int], pieces: list[int]) -> None:
    sent = [bytes([1 + i]) * size for i, size in enumerate(sizes)]
    got: list[bytes] = []
    frames = Frames(got.append, lambda _: pytest.fail("nothing here is the library's"), lambda _: True, lambda: True)
    left = memoryview(b"".join(Frame(Opcode.BINARY, data).serialize(mask=True) for data in sent))
    steps = iter(pieces)
    come = 0
    while left:
        room = frames.room()
        assert len(room) > 0
        count = min(len(room), len(left), next(steps, 1 << 20))
        room[:count] = left[:count]
        frames.take(count)
        left, come = left[count:], come + count
        assert frames.capacity <= max(1 << 15, 2 * come, max(sizes) + (1 << 13))
    assert got == sent


def test_what_a_header_claims_costs_nothing() -> None:
    def nothing(_: bytes) -> None:
        pytest.fail("no message has come")

    frames = Frames(nothing, nothing, lambda _: True, lambda: True)
    tracemalloc.start()
    try:
        frames.feed(HEADER_OF_A_GIGABYTE)
        for _ in range(100):
            frames.feed(b"x" * 1000)
        assert frames.capacity == 1 << 17 and tracemalloc.get_traced_memory()[1] < 1 << 19
    finally:
        tracemalloc.stop()


def test_a_large_buffer_is_given_back() -> None:
    got: list[int] = []
    frames = Frames(lambda data: got.append(len(data)), lambda _: None, lambda _: True, lambda: True)
    for size, least, most in ((300_000, 300_000, 1 << 19), (3 << 20, 0, 1 << 15), (300_000, 300_000, 1 << 19)):
        frames.feed(Frame(Opcode.BINARY, bytes(size)).serialize(mask=True))
        assert got.pop() == size and least <= frames.capacity <= most


def test_a_peer_that_has_sent_much_is_believed_so_much_and_no_more() -> None:
    frames = Frames(lambda _: None, lambda _: None, lambda _: True, lambda: True)
    frames.feed(Frame(Opcode.BINARY, bytes(3 << 20)).serialize(mask=True))
    frames.feed(HEADER_OF_A_GIGABYTE + bytes(1 << 15))
    assert 3 << 20 < frames.capacity < (3 << 20) + (1 << 13)


App = Callable[[Any, Any, Any], Awaitable[None]]


@contextmanager
def serving(app: App, loop: Callable[[], asyncio.AbstractEventLoop]) -> Iterator[int]:
    """A real server on a free port."""
    config = uvicorn.Config(app, ws=RobotWebSocket, ws_max_size=1 << 21, ws_per_message_deflate=False, lifespan="off",
                            log_config=None)  # fmt: skip
    server, sock = uvicorn.Server(config), bind("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock]), loop_factory=loop))
    thread.start()
    try:
        yield int(sock.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Any:
    return request.param


def dial(port: int, **options: Any) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{port}/", compression=None, max_size=None, proxy=None, **options)


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": event.get("bytes"), "text": event.get("text")})


def test_a_real_client_gets_back_what_it_sent(loop: Any) -> None:
    sizes = (0, 1, 125, 126, 65_535, 65_536, 70_000, 300_000, (1 << 20) + 3, 17)
    with serving(echo, loop) as port, dial(port) as client:
        for number, size in enumerate(sizes):
            message = bytes([number, 200 - number]) * (size // 2) + b"z" * (size % 2)
            client.send(message)
            assert client.recv(20) == message
            client.send("a text between")
            assert client.recv(20) == "a text between"
            client.send([message, b"", b"and more"])  # in fragments
            assert client.recv(20) == message + b"and more"
            assert client.ping(str(number)).wait(20)
        for number in range(20):
            client.send(bytes([number]) * 90_000)  # not waiting for the answers
        assert [client.recv(20) for _ in range(20)] == [bytes([number]) * 90_000 for number in range(20)]
        client.send(bytes((1 << 24) + 1))  # to its end, although it is refused at its beginning
        with pytest.raises(ConnectionClosedError) as closed:
            client.recv(20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


def send_for(seconds: float, raw: socket.socket) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        raw.sendall(bytes(1 << 16))


def test_a_refused_peer_that_does_not_leave_is_left(monkeypatch: pytest.MonkeyPatch, loop: Any) -> None:
    monkeypatch.setattr(ws_protocol, "_LINGER_S", 0.3)
    with serving(echo, loop) as port, dial(port) as client, contextlib.closing(client.socket.dup()) as raw:
        raw.sendall(HEADER_OF_A_GIGABYTE)
        raw.settimeout(20)
        with pytest.raises(ConnectionError):
            send_for(20, raw)


def test_an_app_that_does_not_read_stops_its_peer(loop: Any) -> None:
    asked = threading.Event()

    async def deaf(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        while not asked.is_set():
            await asyncio.sleep(0.01)
        while (await receive())["type"] == "websocket.receive":
            pass

    message = Frame(Opcode.BINARY, bytes(1 << 20)).serialize(mask=True)
    with serving(deaf, loop) as port, dial(port) as client, contextlib.closing(client.socket.dup()) as raw:
        raw.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 100 * len(message):
                sent += raw.send(message[sent % len(message) :])
        assert sent < 100 * len(message)
        asked.set()
        raw.settimeout(20)
        while sent < 100 * len(message):
            sent += raw.send(message[sent % len(message) :])
