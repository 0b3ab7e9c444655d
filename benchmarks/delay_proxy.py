"""A TCP proxy on the loopback with a network's faults: delay, jitter, a cut, a lost connection.

Bytes are delayed, never lost and never reordered, as TCP shows a network to a program: what is sent during a cut
arrives after it. Runs on a thread of its own, so that it can stand between blocking clients and any server.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import deque
from collections.abc import Coroutine
from typing import Any, Literal

Direction = Literal["both", "up", "down"]

_CHUNK = 1 << 16
_UNREAD = 64 * _CHUNK  # bytes on the way in one direction before the sender has to wait


class DelayProxy:
    """Forwards a loopback port of its own (`port`) to `target`; use as a context manager.

    delay_s: of every piece of data, in seconds; jitter_s: uniform around it, delay_s +/- jitter_s, at least 0, drawn
    from `seed`. direction: which way is delayed; "up" is from the client to the target. With "both" a round trip takes
    twice the delay. May be changed while it runs: `delay_s`, `jitter_s`. Raises OSError when the port is taken.
    """

    def __init__(self, target: int, *, delay_s: float = 0.0, jitter_s: float = 0.0, seed: int = 0,
                 direction: Direction = "both", port: int = 0) -> None:  # fmt: skip
        if delay_s < 0 or jitter_s < 0:
            raise ValueError(f"delay_s, jitter_s: expected seconds >= 0, got {delay_s} and {jitter_s}")
        if direction not in ("both", "up", "down"):
            raise ValueError(f"direction: expected both, up or down, got {direction!r}")
        self.target, self.port, self.direction = target, port, direction
        self.delay_s, self.jitter_s = delay_s, jitter_s
        self.accepted = 0
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="delay-proxy", daemon=True)
        self._links: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> "DelayProxy":
        self._thread.start()
        try:
            self._call(self._listen())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._shut())
        self._stop()

    def cut(self) -> None:
        """Nothing passes until `restore`, and nobody is told: connections stay open, new ones get no answer."""
        self._call(self._set(False))

    def restore(self) -> None:
        """End of a cut: what was sent meanwhile arrives now."""
        self._call(self._set(True))

    def drop(self) -> None:
        """Reset every connection (both sides see an error); new ones are accepted."""
        self._call(self._reset())

    async def _listen(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _set(self, passes: bool) -> None:
        (self._open.set if passes else self._open.clear)()

    async def _reset(self) -> None:
        for writer in list(self._writers):
            # no lingering: the close is a reset and not the orderly end of a stream
            link: socket.socket = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _shut(self) -> None:
        self._server.close()
        await self._reset()
        for task in list(self._links):
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

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
        self._links.add(task)
        self._writers.add(writer)
        out = None
        try:
            await self._open.wait()
            there, out = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.add(out)
            await asyncio.gather(self._carry(reader, out, "up"), self._carry(there, writer, "down"))
        except (OSError, asyncio.CancelledError):  # either side is gone: so is the other
            pass
        finally:
            for end in (writer, out):
                if end is not None:
                    self._writers.discard(end)
                    end.close()
            self._links.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        """One direction: a reader stamps the pieces with their time of arrival, a writer lets them go in order."""
        waiting: deque[tuple[float, bytes]] = deque()
        news, room = asyncio.Event(), asyncio.Event()
        room.set()
        sender = asyncio.ensure_future(self._release(waiting, news, room, writer))
        due = 0.0
        try:
            while True:
                data = await reader.read(_CHUNK)
                due = max(due, self._loop.time() + self._lag(way))
                waiting.append((due, data))
                news.set()
                if not data:
                    break
                if sum(len(piece) for _, piece in waiting) > _UNREAD:
                    room.clear()
                    await room.wait()
            await sender
        finally:
            sender.cancel()

    async def _release(self, waiting: deque[tuple[float, bytes]], news: asyncio.Event, room: asyncio.Event,
                       writer: asyncio.StreamWriter) -> None:  # fmt: skip
        while True:
            if not waiting:
                news.clear()
                await news.wait()
            due, data = waiting[0]
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            await self._open.wait()
            waiting.popleft()
            room.set()
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()

    def _lag(self, way: str) -> float:
        if self.direction not in ("both", way):
            return 0.0
        return max(0.0, self.delay_s + self._random.uniform(-self.jitter_s, self.jitter_s))
