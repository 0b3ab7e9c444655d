"""Ending well: finish what was asked, tell every connection goodbye, then stop."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fastapi import WebSocket

from services.common.errors import ServiceError

GOING_AWAY = 1001


class Connections:
    """Open websockets and requests in flight of one service. Used on the event loop only."""

    def __init__(self) -> None:
        self._sockets: set[WebSocket] = set()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.stopping = asyncio.Event()

    @property
    def draining(self) -> bool:
        return self.stopping.is_set()

    @property
    def count(self) -> int:
        return len(self._sockets)

    @contextmanager
    def connected(self, socket: WebSocket) -> Iterator[None]:
        self._sockets.add(socket)
        try:
            yield
        finally:
            self._sockets.discard(socket)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Hold the shutdown back until this request is answered; refuses new ones once it has begun."""
        if self.draining:
            raise ServiceError("shutting_down", "the service is shutting down; connect again in a moment")
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def drain(self, patience_s: float) -> None:
        """Refuse new requests, wait for those in flight, close every websocket with 1001."""
        self.stopping.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), patience_s)
        await asyncio.gather(*(_close(socket) for socket in list(self._sockets)))


async def _close(socket: Any) -> None:
    with suppress(Exception):  # it may be gone already
        await asyncio.wait_for(socket.close(GOING_AWAY, "the service is shutting down"), 0.5)
