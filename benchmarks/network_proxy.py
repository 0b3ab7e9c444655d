"""A TCP proxy on the loopback with a network's faults: delay, jitter, a thin link, cuts, resets, half-open connections.

What passes is never lost and never reordered, as TCP shows a network to a program. Runs on a thread of its own, so that
it can stand between blocking clients and any server.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

Direction = Literal["both", "up", "down"]

_CHUNK = 1 << 16
_UNREAD = 64 * _CHUNK  # bytes on the way in one direction before the sender has to wait
_TICK_S = 0.05  # of a thin link


@dataclass(eq=False)
class _Link:
    """One connection through the proxy. frozen: it carries nothing any more."""

    task: asyncio.Task[None]
    writers: list[asyncio.StreamWriter]
    frozen: bool = False


@dataclass(eq=False)
class _Way:
    """One direction of a link: pieces with the time at which each is due, the newest last; empty data is the end."""

    link: _Link
    name: Literal["up", "down"]
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    room: asyncio.Event = field(default_factory=asyncio.Event)


class NetworkProxy:
    """Forwards a loopback port of its own (`port`) to `target`; use as a context manager.

    delay_s: of every piece of data, in seconds; jitter_s: uniform around it, delay_s +/- jitter_s, at least 0, drawn
    from `seed`. direction: which way is delayed; "up" is from the client to the target. With "both" a round trip takes
    twice the delay. May be changed while it runs: `delay_s`, `jitter_s` and `down_bytes_s`, the most bytes a second to
    the client (None = all). accepted: connections so far. The methods return when the change is made. Raises OSError
    when the port is taken.
    """

    def __init__(self, target: int, *, delay_s: float = 0.0, jitter_s: float = 0.0, seed: int = 0,
                 direction: Direction = "both", port: int = 0) -> None:  # fmt: skip
        if delay_s < 0 or jitter_s < 0:
            raise ValueError(f"delay_s, jitter_s: expected seconds >= 0, got {delay_s} and {jitter_s}")
        if direction not in ("both", "up", "down"):
            raise ValueError(f"direction: expected both, up or down, got {direction!r}")
        self.target, self.port, self.direction = target, port, direction
        self.delay_s, self.jitter_s = delay_s, jitter_s
        self.down_bytes_s: float | None = None
        self.accepted = 0
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network-proxy", daemon=True)
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._passes = asyncio.Event()
        self._passes.set()

    def __enter__(self) -> "NetworkProxy":
        self._thread.start()
        try:
            self.mend()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._shut())
        self._stop()

    def url(self, path: str = "/act") -> str:
        """Of a websocket service at the other end."""
        return f"ws://127.0.0.1:{self.port}{path}"

    def drop(self) -> None:
        """Reset every connection (both sides see an error); new ones are accepted."""
        self._call(self._reset())

    def cut(self) -> None:
        """Reset every connection and refuse new ones, until `mend`."""
        self._call(self._close())

    def mend(self) -> None:
        """Accept connections again, on the same port."""
        self._call(self._listen())

    def pause(self) -> None:
        """Nothing passes until `resume`, and nobody is told: connections stay open, new ones get no answer."""
        self._call(self._set(False))

    def resume(self) -> None:
        """End of a pause: what was sent meanwhile arrives now."""
        self._call(self._set(True))

    def freeze(self) -> None:
        """Half-open: the connections of now stay open and never carry anything again; new ones work."""
        self._call(self._freeze())

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._reset()

    async def _set(self, passes: bool) -> None:
        (self._passes.set if passes else self._passes.clear)()

    async def _freeze(self) -> None:
        for link in self._links:
            link.frozen = True

    async def _reset(self) -> None:
        for writer in [writer for link in self._links for writer in link.writers]:
            # no lingering: the close is a reset and not the orderly end of a stream
            end: socket.socket = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _shut(self) -> None:
        await self._close()
        tasks = [link.task for link in self._links]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        link = _Link(task, [writer])
        self._links.add(link)
        try:
            await self._passes.wait()
            there, out = await asyncio.open_connection("127.0.0.1", self.target)
            link.writers.append(out)
            async with asyncio.TaskGroup() as tasks:
                for way, source, sink in ((_Way(link, "up"), reader, out), (_Way(link, "down"), there, writer)):
                    tasks.create_task(self._read(way, source))
                    tasks.create_task(self._release(way, sink))
        except* OSError:  # either side is gone: so is the other
            pass
        finally:
            for end in link.writers:
                end.close()
            self._links.discard(link)

    async def _read(self, way: _Way, reader: asyncio.StreamReader) -> None:
        """Stamp the pieces of one direction with the time at which they are due."""
        due, data = 0.0, b"?"
        while data:
            data = await reader.read(_CHUNK)
            due = max(due, self._loop.time() + self._lag(way.name))
            way.waiting.append((due, data))
            way.news.set()
            if sum(len(piece) for _, piece in way.waiting) > _UNREAD:
                way.room.clear()
                await way.room.wait()

    async def _release(self, way: _Way, writer: asyncio.StreamWriter) -> None:
        """Let them go when they are due, in order."""
        while True:
            if not way.waiting:
                way.news.clear()
                await way.news.wait()
            due, data = way.waiting[0]
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            await self._passes.wait()
            way.waiting.popleft()
            way.room.set()
            if way.link.frozen:
                continue
            if not data:
                writer.write_eof()
                return
            await self._write(way, writer, data)

    async def _write(self, way: _Way, writer: asyncio.StreamWriter, data: bytes) -> None:
        while data and not way.link.frozen:
            rate = self.down_bytes_s if way.name == "down" else None
            size = len(data) if rate is None else max(1, int(rate * _TICK_S))
            piece, data = data[:size], data[size:]
            writer.write(piece)
            await writer.drain()
            if rate is not None:
                await asyncio.sleep(_TICK_S)

    def _lag(self, way: str) -> float:
        if self.direction not in ("both", way):
            return 0.0
        return max(0.0, self.delay_s + self._random.uniform(-self.jitter_s, self.jitter_s))
