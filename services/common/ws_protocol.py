"""uvicorn's websocket with a short way for what robots do all day: one large binary message in, a small one out."""

import asyncio
import struct
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

from services.common.ws_frames import Frames

_FIN_BINARY = 0x82
_LINGER_S = 2.0  # for a peer that is still sending what has been refused


class RobotWebSocket(WebSocketsSansIOProtocol):
    """The same messages, closes and errors as its base. Whole binary messages do not pass through the library's parser,
    and the kernel writes them where they are unmasked (`asyncio.BufferedProtocol`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._frames = Frames(self._arrived, super().data_received, self._plain, lambda: not self.conn.eof_sent)
        self._asked = False  # the app waits for a message
        self._refused = False  # the peer has broken the protocol, and been told

    def data_received(self, data: bytes) -> None:
        """The handshake, and what comes before the app has accepted it."""
        if self.handshake_initiated:
            self._frames.feed(data)
        else:
            super().data_received(data)

    async def send(self, message: Any) -> None:
        data = message.get("bytes")
        if data is not None and message["type"] == "websocket.send" and self._open():
            self.transport.write(_header(len(data)) + data)
            return
        await super().send(message)
        if message["type"] == "websocket.accept" and not self.transport.is_closing():
            self.transport.set_protocol(_Reader(self, self._frames))

    async def receive(self) -> Any:
        self._asked = True
        try:
            return await super().receive()
        finally:
            self._asked = False

    def handle_parser_exception(self) -> None:
        """As the base, but the socket stays open for reading until the peer has closed it: closing it while bytes come
        is a reset, which takes from the peer the reason that was just sent."""
        if self._refused:
            return
        self._refused = True
        sent = self.conn.close_sent
        assert sent is not None
        self.queue.put_nowait({"type": "websocket.disconnect", "code": sent.code, "reason": sent.reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(_LINGER_S, self.transport.close)

    def _arrived(self, data: bytes) -> None:
        if self.close_sent:
            return
        handed_over = self._asked and self.queue.empty()
        self.queue.put_nowait({"type": "websocket.receive", "bytes": data})
        if not handed_over and not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    def _plain(self, size: int) -> bool:
        """Whether a message of this size may pass by the library: in the middle of a fragmented one, or above the
        limit, it has something to say."""
        most = self.conn.max_message_size
        return self.conn.current_size is None and (most is None or size <= most)

    def _open(self) -> bool:
        return (
            self.conn.state is State.OPEN
            and not self.close_sent
            and not self.disconnected
            and not self.conn.extensions
            and self.writable.is_set()
        )


class _Reader(asyncio.BufferedProtocol):
    """The receiving end of an accepted websocket."""

    def __init__(self, socket: RobotWebSocket, frames: Frames) -> None:
        self._socket, self._frames = socket, frames

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        return self._frames.room()

    def buffer_updated(self, nbytes: int) -> None:
        self._frames.take(nbytes)

    def eof_received(self) -> None:
        self._socket.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._socket.connection_lost(exc)

    def pause_writing(self) -> None:
        self._socket.pause_writing()

    def resume_writing(self) -> None:
        self._socket.resume_writing()


def _header(size: int) -> bytes:
    """Of a binary message to a client, which is not masked."""
    if size < 126:
        return struct.pack("!BB", _FIN_BINARY, size)
    if size < 1 << 16:
        return struct.pack("!BBH", _FIN_BINARY, 126, size)
    return struct.pack("!BBQ", _FIN_BINARY, 127, size)
