"""The doors of a server: how many connections may be open, and how long a peer may take over a request.

A connection costs a file descriptor before it has said who it is, so these bounds come before any key is looked at. An
open websocket that is silent is none of theirs: uvicorn pings it, and a peer that is in the middle of a frame cannot
answer a ping.
"""

import asyncio
import resource
import time
from collections.abc import Callable, Collection
from http import HTTPStatus
from typing import Any, NamedTuple, cast

from services.common.quota import Clock
from services.common.settings import Access

_OTHER_FILES = 128  # of a process, beside its connections: models, logs, the engine's
_REQUESTS = 64  # of one address, beside its sessions
_LINGER_S = 0.5  # a refused peer has to send its request and to read the answer
_MOST_LINGERING = 64
_SWEEPS = 4  # in the time that a peer has

Refused = Callable[[str, str, str], None]
"""Told the reason (a label of the metric), the address, and the words."""


class _Stage(NamedTuple):
    """What a connection waits for from its peer: the `head` of a request or its `body`, to `take` a reply, or to be let
    `go`. cycle: uvicorn's, of this request (of the one before, for a head)."""

    part: str
    cycle: Any


class Doors:
    """The bounds of one server. Used on its event loop only. connections: the open ones, as uvicorn keeps them."""

    def __init__(
        self, access: Access, connections: Collection[Any], refused: Refused, clock: Clock = time.monotonic
    ) -> None:
        self.request_s = access.request_s
        self._most, self._most_of_address = _most(access)
        self._connections, self._refused, self._clock = connections, refused, clock
        self._stages: dict[Any, tuple[_Stage, float]] = {}
        self._next_sweep = 0.0
        self._lingering = 0

    def entry(self, make: Callable[[], asyncio.Protocol]) -> asyncio.Protocol:
        """For a connection that is about to be made: becomes what `make` gives, or refuses it with 503."""
        return _Entry(self, make)

    def why_not(self, host: str) -> str | None:
        """Why a further connection from this address is not taken; None when it is."""
        if len(self._connections) >= self._most:
            return f"{self._most} connections are open; no room for another"
        if sum((there.client or ("",))[0] == host for there in self._connections) >= self._most_of_address:
            return f"{self._most_of_address} connections are open from {host}; close one first"
        return None

    def refuse(self, transport: asyncio.BaseTransport, why: str) -> bool:
        """Count a refusal. Whether there is room to let its peer read the words."""
        self._refused("connections", _host(transport), why)
        self._lingering += 1
        return self._lingering <= _MOST_LINGERING

    def refused_gone(self) -> None:
        """A refused connection is closed."""
        self._lingering -= 1

    def sweep(self) -> None:
        """End what has waited too long for its peer. To be called often; looks a few times in the time allowed."""
        now = self._clock()
        if now < self._next_sweep:
            return
        self._next_sweep = now + min(1.0, self.request_s / _SWEEPS)
        before, self._stages = self._stages, {}
        for connection in list(self._connections):
            stage = _stage(connection)
            if stage is None:
                continue
            known = before.get(connection)
            since = now if known is None or known[0] != stage else known[1]
            self._stages[connection] = stage, since
            if now - since >= self.request_s:
                self._end(connection.transport, stage)

    def _end(self, transport: asyncio.Transport, stage: _Stage) -> None:
        if stage.part == "go":
            transport.abort()
            return
        what = "a reply to be read" if stage.part == "take" else f"the {stage.part} of a request"
        why = f"expected {what} within {self.request_s:g} s, got a part of it or none"
        self._refused("slow", _host(transport), why)
        if stage.part == "take":  # a close would wait until everything is sent
            transport.abort()
            return
        if stage.part == "head" or not stage.cycle.response_started:
            transport.write(_answer(HTTPStatus.REQUEST_TIMEOUT, why))
        transport.close()


class _Entry(asyncio.Protocol):
    """What a connection meets first."""

    def __init__(self, doors: Doors, make: Callable[[], asyncio.Protocol]) -> None:
        self._doors, self._make = doors, make

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        why = self._doors.why_not(_host(transport))
        protocol = self._make() if why is None else _Refusal(self._doors, why)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


class _Refusal(asyncio.Protocol):
    """Answers the first bytes of a request (clients are not made for an answer before that), reads on so that the
    close is no reset, which would take the answer away, and closes."""

    def __init__(self, doors: Doors, why: str) -> None:
        self._doors, self._why = doors, why
        self._told = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._doors.refuse(transport, self._why):
            self._timer = asyncio.get_running_loop().call_later(_LINGER_S, self._close)
        else:
            self._timer = asyncio.get_running_loop().call_later(0.0, self._transport.abort)

    def data_received(self, _: bytes) -> None:
        self._tell()

    def connection_lost(self, _: Exception | None) -> None:
        self._timer.cancel()
        self._doors.refused_gone()

    def _close(self) -> None:
        self._tell()
        self._transport.close()

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            self._transport.write(_answer(HTTPStatus.SERVICE_UNAVAILABLE, self._why))


def _stage(connection: Any) -> _Stage | None:
    """None when nothing is awaited, and for websockets."""
    if connection.transport.is_closing():
        return _Stage("go", None)
    if not hasattr(connection, "cycle"):
        return None
    cycle = connection.cycle
    if cycle is None or cycle.response_complete:
        return _Stage("head", cycle)
    if cycle.more_body:
        return _Stage("body", cycle)
    return _Stage("take", cycle) if connection.flow.write_paused else None


def _most(access: Access) -> tuple[int, int]:
    """Connections in all and of one address. Unless set: of one address, room for every session (a proxy's address is
    that of every robot behind it) and for requests beside them; in all, twice that, and no more than files may be."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    allowed = 1 << 30 if files == resource.RLIM_INFINITY else max(files - _OTHER_FILES, 1)
    of_address = access.address_connections or access.max_sessions + _REQUESTS
    return min(access.max_connections or 2 * of_address, allowed), of_address


def _host(transport: asyncio.BaseTransport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else "unknown"


def _answer(status: HTTPStatus, words: str) -> bytes:
    body = words.encode()
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: text/plain; charset=utf-8\r\n"
    head += f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    return head.encode() + body
