"""Server-sent events: every listener first gets a snapshot of every robot, then what happens."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

_BACKLOG = 2000
_KEEPALIVE_S = 10.0
_COMMENT = ": still here\n\n"  # a comment: proxies and browsers notice a dead peer


class Broadcast:
    """Fans events out to listeners; one that does not keep up gets a fresh snapshot instead of the backlog."""

    def __init__(self, snapshot: Callable[[], Iterable[dict[str, Any]]]) -> None:
        self._snapshot = snapshot
        self._listeners: set[asyncio.Queue[str | None]] = set()

    def send(self, event: dict[str, Any]) -> None:
        """To every listener, now."""
        if not self._listeners:
            return
        line = encode(event)
        for queue in self._listeners:
            if queue.full():
                while not queue.empty():
                    queue.get_nowait()
                for state in self._snapshot():
                    queue.put_nowait(encode(state))
            queue.put_nowait(line)

    def wake(self) -> None:
        """Let every stream say something now, so that whoever reads it can look up."""
        for queue in self._listeners:
            if queue.empty():
                queue.put_nowait(_COMMENT)

    def end(self) -> None:
        """Let every stream end."""
        for queue in self._listeners:
            while queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    async def listen(self) -> AsyncGenerator[str]:
        """The text of one listener's stream, until `end`."""
        queue: asyncio.Queue[str | None] = asyncio.Queue(_BACKLOG)
        self._listeners.add(queue)
        try:
            yield "retry: 1000\n\n" + "".join(encode(state) for state in self._snapshot())
            while True:
                try:
                    line = await asyncio.wait_for(queue.get(), _KEEPALIVE_S)
                except TimeoutError:
                    yield _COMMENT
                    continue
                if line is None:
                    return
                yield line
        finally:
            self._listeners.discard(queue)


def encode(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, allow_nan=False, separators=(',', ':'))}\n\n"
