"""Observations for the critic, taken from the policy's traffic on the side: bounded, and never waited for."""

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from websockets import Subprotocol
from websockets.asyncio.client import ClientConnection, connect

from recap_client import wire
from services.common.logs import get_logger

_RETRY_S = 1.0
_ANSWER_S = 2.0
_EVENTS = 256

log = get_logger("tap")


class CriticTap:
    """Forwards messages of `recap.v1` to a critic service, from a thread and an event loop of its own.

    Each robot has one place in the queue, which a newer observation takes over, and one observation under way at a
    time, so that a slow critic sees fewer frames and nobody waits. `reset` and `outcome` messages keep their order
    and are kept (up to 256) while the critic is away.

    tls: for a `wss://` url; None = the CAs of the system. count: called with "sent", "dropped" or "failed" for every
    observation. judged: called with every reply that has a value, from the tap's thread.
    """

    def __init__(
        self,
        url: str,
        *,
        hz: float = 20.0,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        count: Callable[[str], None] = lambda _: None,
        judged: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self._judged = judged
        self._url, self._period, self._api_key, self._count = url, 1.0 / hz, api_key, count
        self._tls = (tls or True) if url.startswith("wss:") else None
        self._queue: dict[object, Mapping[str, Any]] = {}  # in order; an observation's key is its robot's name
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._under_way: dict[str, float] = {}
        self.connected = False
        self._thread = threading.Thread(target=self._run, name="critic-tap", daemon=True)
        self._main: asyncio.Task[None] | None = None
        self._thread.start()

    def observe(self, message: Mapping[str, Any]) -> None:
        """Offer an `observe` message. Returns at once, whatever the critic does."""
        robot, now = str(message["robot"]), time.monotonic()
        if now - self._last.get(robot, -1e9) < self._period * 0.9 or not self.connected:
            self._count("dropped" if self.connected else "failed")
            return
        self._last[robot] = now
        with self._lock:
            if self._queue.pop(robot, None) is not None:
                self._count("dropped")
            self._queue[robot] = message
        self._notify()

    def event(self, message: Mapping[str, Any]) -> None:
        """Offer a `reset` or `outcome` message."""
        with self._lock:
            if message["type"] == "reset":  # a frame of the last episode that still waits would bring it back
                self._queue.pop(str(message["robot"]), None)
            if len(self._queue) < _EVENTS:
                self._queue[object()] = message
        self._notify()

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join(timeout=2.0)

    def _cancel(self) -> None:
        if self._main is not None:
            self._main.cancel()

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(self._wake.set)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(self._stay_connected())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main)
        self._loop.close()

    async def _stay_connected(self) -> None:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else None
        told = False
        while True:
            try:
                async with connect(
                    self._url,
                    subprotocols=[Subprotocol("recap.v1")],
                    compression=None,
                    max_size=2**20,
                    proxy=None,
                    open_timeout=5,
                    additional_headers=headers,
                    ssl=self._tls,
                ) as socket:
                    log.info("critic connected", url=self._url)
                    told = False
                    self._under_way.clear()
                    self.connected = True
                    await self._exchange(socket)
            except Exception as error:  # also a reply that does not decode: the tap must come back
                if not told:
                    log.warning(
                        "critic not reachable; the policy serves on without it",
                        url=self._url,
                        error=f"{type(error).__name__}: {error}",
                    )
                told = True
            finally:
                self.connected = False
            await asyncio.sleep(_RETRY_S)

    async def _exchange(self, socket: ClientConnection) -> None:
        reader = asyncio.create_task(self._read(socket))
        reader.add_done_callback(lambda _: self._wake.set())
        try:
            while not reader.done():
                for message in self._ready():
                    await socket.send(wire.pack(message))
                    if message["type"] == "observe":
                        self._count("sent")
                with contextlib.suppress(TimeoutError):  # an answer that never comes must not hold a robot back
                    await asyncio.wait_for(self._wake.wait(), _ANSWER_S)
                self._wake.clear()
            reader.result()
        finally:
            reader.cancel()

    def _ready(self) -> list[Mapping[str, Any]]:
        now = time.monotonic()
        with self._lock:
            keys = [
                key
                for key in self._queue
                if not isinstance(key, str) or now - self._under_way.get(key, -1e9) > _ANSWER_S
            ]
            messages = [self._queue.pop(key) for key in keys]
        self._under_way.update({key: now for key in keys if isinstance(key, str)})
        return messages

    async def _read(self, socket: ClientConnection) -> None:
        async for data in socket:
            reply = wire.unpack(data) if isinstance(data, bytes) else {}
            robot = reply.get("robot") if isinstance(reply, dict) else None
            if robot is None:
                continue
            self._under_way.pop(robot, None)
            if reply.get("type") == "value":
                self._judged(reply)
            self._wake.set()
