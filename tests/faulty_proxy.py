"""A TCP proxy on loopback that can be cut, frozen, throttled and slowed down: the network between robot and service."""

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

_PIECE = 1 << 16
_TICK_S = 0.05


class _Link:
    """One connection through the proxy."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = writers
        self.flows = asyncio.Event()
        self.flows.set()

    def abort(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class FaultyProxy:
    """Use as a context manager; robots connect to `port`, which leads to `target` on loopback.

    Its methods return when the change is made. delay_s: how long every piece of either direction is held back;
    down_bytes_s: most bytes a second from the service to the robot, None = all.
    """

    def __init__(self, target: int) -> None:
        self.target, self.port = target, 0
        self.delay_s = 0.0
        self.down_bytes_s: float | None = None
        self.accepted = 0
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy", daemon=True)

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        self.mend()
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def url(self, path: str = "/act") -> str:
        return f"ws://127.0.0.1:{self.port}{path}"

    def drop(self) -> None:
        """Reset every connection; new ones are taken."""
        self._call(self._drop())

    def cut(self) -> None:
        """Reset every connection and refuse new ones, until `mend`."""
        self._call(self._cut())

    def mend(self) -> None:
        """Take connections again, on the same port."""
        self._call(self._listen())

    def freeze(self) -> None:
        """Half-open: the connections of now stay open and carry nothing any more; new ones work."""
        self._call(self._freeze())

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _drop(self) -> None:
        for link in self._links:
            link.abort()

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._drop()

    async def _freeze(self) -> None:
        for link in self._links:
            link.flows.clear()

    async def _end(self) -> None:
        await self._cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, back)
        self._links.add(link)
        pumps = [asyncio.create_task(self._pump(link, reader, back)),
                 asyncio.create_task(self._pump(link, there, writer, down=True))]  # fmt: skip
        self._tasks.update(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        self._tasks.difference_update(pumps)
        self._links.discard(link)
        link.abort()

    async def _pump(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, down: bool = False
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(_PIECE):
                await link.flows.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                for piece in self._pieces(data, down):
                    writer.write(piece)
                    await writer.drain()
                    if down and self.down_bytes_s is not None:
                        await asyncio.sleep(_TICK_S)
            await writer.drain()

    def _pieces(self, data: bytes, down: bool) -> list[bytes]:
        if not down or self.down_bytes_s is None:
            return [data]
        size = max(1, int(self.down_bytes_s * _TICK_S))
        return [data[at : at + size] for at in range(0, len(data), size)]
