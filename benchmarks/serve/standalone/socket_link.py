"""The robot's end of a websocket or an HTTP connection, with as little of its own as can be: the request is encoded and
masked beforehand and sent again and again, so that what is measured is the server."""

import asyncio
import socket
from typing import Any, Protocol

from sample import decode


class LinkError(Exception):
    """The server refused, answered with something else than actions, or hung up."""


class Codec(Protocol):
    """Bytes to send for one request, and replies out of the bytes that come."""

    request: bytes

    def hello(self) -> bytes:
        """What opens the connection; empty where nothing does."""

    def feed(self, data: bytes) -> list[bytes]:
        """Complete replies. Raises LinkError when one is a refusal."""

    def owed(self) -> bytes:
        """What must be sent although nobody asked (pongs)."""


class WebsocketCodec:
    """openpi's protocol: the server greets with a metadata frame; binary frames both ways."""

    def __init__(self, port: int, message: bytes) -> None:
        from websockets.client import ClientProtocol
        from websockets.frames import Frame, Opcode
        from websockets.uri import parse_uri

        self._protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}/"), max_size=None)
        self.request = Frame(Opcode.BINARY, message).serialize(mask=True)
        self._text, self._binary, self._again = Opcode.TEXT, Opcode.BINARY, Opcode.CONT
        self._parts: list[bytes] = []

    def hello(self) -> bytes:
        self._protocol.send_request(self._protocol.connect())
        return b"".join(self._protocol.data_to_send())

    def feed(self, data: bytes) -> list[bytes]:
        self._protocol.receive_data(data)
        replies = []
        for event in self._protocol.events_received():
            opcode = getattr(event, "opcode", None)  # the handshake's response has none
            if opcode == self._text:
                raise LinkError(bytes(event.data).decode("utf-8", "replace"))  # type: ignore[union-attr]
            if opcode in (self._binary, self._again):
                self._parts.append(bytes(event.data))  # type: ignore[union-attr]
                if event.fin:  # type: ignore[union-attr]
                    replies.append(b"".join(self._parts))
                    self._parts.clear()
        if self._protocol.handshake_exc is not None:
            raise LinkError(str(self._protocol.handshake_exc))
        return replies

    def owed(self) -> bytes:
        return b"".join(self._protocol.data_to_send())


class HttpCodec:
    """One POST after the other on one connection."""

    def __init__(self, port: int, message: bytes, path: str) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/octet-stream\r\n"
        self.request = f"{head}Content-Length: {len(message)}\r\n\r\n".encode() + message
        self._buffer = b""

    def hello(self) -> bytes:
        return b""

    def feed(self, data: bytes) -> list[bytes]:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return []
        lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if "content-length" not in fields:
            raise LinkError(f"expected a Content-Length, got {lines[0]}")
        if len(body) < int(fields["content-length"]):
            return []
        self._buffer = b""
        if " 200 " not in lines[0] + " ":
            raise LinkError(f"{lines[0]}: {body[:200]!r}")
        return [body]

    def owed(self) -> bytes:
        return b""


class SocketLink:
    """Blocking: for one robot that asks as soon as it is answered. No event loop of the client's is in the figure."""

    def __init__(self, codec: Codec, port: int, timeout_s: float) -> None:
        self._codec = codec
        self._socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hello := codec.hello():
            self._socket.sendall(hello)
            self._reply()  # the metadata

    def ask(self) -> bytes:
        self._socket.sendall(self._codec.request)
        return self._reply()

    def actions(self, reply: bytes) -> Any:
        return decode(reply)["actions"]

    def close(self) -> None:
        self._socket.close()

    def _reply(self) -> bytes:
        while True:
            data = self._socket.recv(1 << 16)
            if not data:
                raise LinkError("the server closed the connection")
            replies = self._codec.feed(data)
            if owed := self._codec.owed():
                self._socket.sendall(owed)
            if replies:
                return replies[0]


class StreamLink(asyncio.Protocol):
    """The same on an event loop: for many robots in one process."""

    def __init__(self, codec: Codec, timeout_s: float) -> None:
        self._codec, self._timeout_s = codec, timeout_s
        self._waiter: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None

    async def open(self, port: int) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", port)
        if hello := self._codec.hello():
            await self._exchange(hello)

    async def ask(self) -> bytes:
        return await self._exchange(self._codec.request)

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _exchange(self, data: bytes) -> bytes:
        if self._transport is None or self._transport.is_closing():
            raise LinkError("the connection is closed")
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._waiter
        except TimeoutError:
            self._transport.abort()  # a reply that comes yet must not be taken for that of the next request
            raise

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            replies = self._codec.feed(data)
        except LinkError as error:
            self._fail(error)
            return
        if (owed := self._codec.owed()) and self._transport is not None:
            self._transport.write(owed)
        if replies and not self._waiter.done():
            self._waiter.set_result(replies[0])

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(LinkError(f"the server closed the connection ({exc})"))

    def _fail(self, error: LinkError) -> None:
        if not self._waiter.done():
            self._waiter.set_exception(error)
