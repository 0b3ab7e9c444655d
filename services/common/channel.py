"""The message loop of `recap.v1`: msgpack maps with a `type`, typed errors that keep the connection."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from recap_client import wire
from services.common.auth import Caller
from services.common.errors import Fault, ServiceError, bad_field, fault_of
from services.common.logs import get_logger
from services.common.observation import with_text_keys
from services.common.throttle import Throttle

SUBPROTOCOL = "recap.v1"
_MAX_PENDING = 16

_FAILED = Throttle()

log = get_logger("channel")

Message = dict[str, Any]


@dataclass(frozen=True)
class Received:
    """One message: its map, and when its last byte was here (`time.perf_counter` seconds)."""

    body: Message
    at: float


Handler = Callable[[Received], Awaitable[bytes | Message]]


def decode(data: bytes, limit: int) -> Message:
    """Unpack one message. Raises ServiceError `too_large` or `bad_message`."""
    if len(data) > limit:
        raise bad_field("too_large", "message", f"at most {limit} bytes", f"{len(data)} bytes")
    body = wire.unpack(data, max_bytes=limit)
    if not isinstance(body, dict):
        raise bad_field("bad_message", "message", "a map with a `type`", type(body).__name__)
    return with_text_keys(body)


def text(body: Mapping[str, Any], name: str, default: str | None = None, *, limit: int = 256) -> str:
    """A text part of a message. Raises ServiceError `bad_message` when it is missing, not text or too long."""
    value = body.get(name, default)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str) or len(value) > limit:
        got = f"{len(value)} characters" if isinstance(value, str) else "none" if value is None else repr(value)[:40]
        raise bad_field("bad_message", name, f"text of at most {limit} characters", got)
    return value


def number(body: Mapping[str, Any], name: str, default: float | None = None) -> float | None:
    """A finite number of a message, or the default when it is absent."""
    value = body.get(name)
    if value is None:
        return default
    try:
        result = float(value)
    except (TypeError, ValueError) as error:
        raise bad_field("bad_message", name, "a number", type(value).__name__) from error
    if result - result != 0:
        raise bad_field("bad_message", name, "a finite number", str(result))
    return result


def whole(body: Mapping[str, Any], name: str) -> int | None:
    """A whole number >= 0 of a message, or None when it is absent."""
    value = number(body, name)
    if value is None:
        return None
    if value < 0 or value != int(value) or value >= 2**63:
        raise bad_field("bad_message", name, "a whole number >= 0", str(value))
    return int(body[name])


def error_message(fault: Fault, seq: Any) -> Message:
    return {"type": "error", "seq": seq if isinstance(seq, int) else None, **fault.to_message()}


class Channel:
    """One connection. Requests named in `concurrent` run beside each other, so that a newer one can overtake; every
    other is answered before the next message is read."""

    def __init__(
        self,
        socket: WebSocket,
        handlers: Mapping[str, Handler],
        caller: Caller,
        *,
        limit: int,
        concurrent: frozenset[str],
    ) -> None:
        self._socket, self._caller, self._limit, self._concurrent = socket, caller, limit, concurrent
        self._handlers: dict[str, Handler] = {"ping": _pong, **handlers}
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, welcome: Message) -> None:
        """Greet, then answer messages until the other side is gone."""
        await self._socket.send_bytes(wire.pack(welcome))
        try:
            while (event := await self._socket.receive())["type"] == "websocket.receive":
                await self._dispatch(event.get("bytes"), time.perf_counter())
        except (WebSocketDisconnect, RuntimeError):  # gone, or closed by the drain while we were about to read
            pass
        finally:
            for task in self._tasks:
                task.cancel()

    async def _dispatch(self, data: bytes | None, at: float) -> None:
        body: Message = {}
        try:
            if data is None:
                raise bad_field("bad_message", "message", "a binary frame", "a text frame")
            try:
                body = decode(data, self._limit)
            finally:  # after, so that the refusal has the request's number; what does not decode costs as much
                self._caller.spend(1, len(data))
            kind = body.get("type")
            handler = self._handlers.get(kind) if isinstance(kind, str) else None
            if handler is None:
                raise bad_field("bad_message", "type", f"one of {sorted(self._handlers)}", repr(kind)[:80])
            if len(self._tasks) >= _MAX_PENDING:
                raise ServiceError("unavailable", f"{_MAX_PENDING} requests of this connection are unanswered")
        except Exception as error:
            await self._reply(error_message(fault_of(error), body.get("seq")))
            return
        if kind in self._concurrent:
            task = asyncio.create_task(self._answer(handler, Received(body, at)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            await self._answer(handler, Received(body, at))

    async def _answer(self, handler: Handler, received: Received) -> None:
        try:
            with self._caller.request():
                reply = await handler(received)
        except Exception as error:
            fault = fault_of(error)
            kind = received.body.get("type")  # one of the handlers'
            if fault.code == "internal" and (more := _FAILED.passes(kind)) is not None:
                untyped = not isinstance(error, ServiceError)
                log.error("request failed", type=kind, error=fault.message, exc_info=untyped, **more)
            reply = error_message(fault, received.body.get("seq"))
        await self._reply(reply)

    async def _reply(self, reply: bytes | Message) -> None:
        try:
            await self._socket.send_bytes(reply if isinstance(reply, bytes) else wire.pack(reply))
        except (WebSocketDisconnect, RuntimeError):
            return  # the other side left while we worked


async def _pong(received: Received) -> Message:
    return {"type": "pong", "t": number(received.body, "t", 0.0), "t_server": time.monotonic()}
