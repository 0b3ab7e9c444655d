"""An app on a port: uvicorn with the limits that robots need, an ending that drains, and a thread to run it in."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from services.common.auth import Gate
from services.common.doors import Doors
from services.common.drain import Connections
from services.common.settings import Limits, Tls
from services.common.tls import server_context
from services.common.ws_protocol import RobotWebSocket

DRAIN_S = 2.5


class PortInUse(ValueError):
    """The address is taken, or not one of this machine."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises PortInUse with the address in one line."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(256)
    except OSError as error:
        sock.close()
        raise PortInUse(
            f"{host}:{port}: cannot listen here ({error.strerror}); stop the other program or choose another port"
        ) from error
    sock.set_inheritable(True)
    return sock


class DrainingServer(uvicorn.Server):
    """uvicorn closes websockets first (1012) and finishes requests afterwards; robots need it the other way round."""

    def __init__(self, config: uvicorn.Config, connections: Connections, gate: Gate) -> None:
        super().__init__(config)
        self._robots = connections
        self._doors = Doors(gate.access, self.server_state.connections, gate.note)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])  # of the app; uvicorn's own listening has no bounds
        for sock in sockets or []:
            server = await asyncio.get_running_loop().create_server(
                lambda: self._doors.entry(self._protocol),
                sock=sock,
                backlog=self.config.backlog,
                ssl=self.config.ssl,
                ssl_handshake_timeout=None if self.config.ssl is None else self._doors.request_s,
            )
            self.servers.append(server)

    async def on_tick(self, counter: int) -> bool:
        self._doors.sweep()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        # A second Ctrl-C ends at once. Unlike uvicorn's, signals are not raised again at the end: draining is exit 0.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        if not self.force_exit:
            await self._robots.drain(DRAIN_S)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )  # type: ignore[call-arg]


@dataclass(frozen=True)
class Running:
    """A served app. `stop` begins the draining and returns at once."""

    server: DrainingServer
    port: int

    def stop(self) -> None:
        self.server.should_exit = True


def make_server(app: FastAPI, limits: Limits, tls: Tls | None = None) -> DrainingServer:
    """A server for an app of `services.policy.app` or `services.critic.app`. Raises TlsError."""
    context = None if tls is None else server_context(tls)
    logging.getLogger("uvicorn.error").addFilter(_tells)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws=RobotWebSocket,
        ws_max_size=limits.frame,
        ws_per_message_deflate=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=1,
        ssl_context_factory=None if context is None else lambda *_: context,
    )
    return DrainingServer(config, app.state.connections, app.state.service.gate)


def _tells(record: logging.LogRecord) -> bool:
    """uvicorn takes every refused websocket for an error of ours; the gate has logged it, and not once a stranger."""
    return "without completing handshake" not in str(record.msg)


@contextmanager
def running(
    app: FastAPI, limits: Limits, *, host: str = "127.0.0.1", port: int = 0, tls: Tls | None = None
) -> Iterator[Running]:
    """Serve `app` from a thread of this process; drains at the end."""
    sock = bind(host, port)
    server = make_server(app, limits, tls)
    ready = threading.Event()

    def work() -> None:
        async def serve() -> None:
            task = asyncio.ensure_future(server.serve(sockets=[sock]))
            while not server.started and not task.done():
                await asyncio.sleep(0.005)
            ready.set()
            await task

        asyncio.run(serve())

    thread = threading.Thread(target=work, name="server", daemon=True)
    thread.start()
    ready.wait(30)
    try:
        yield Running(server, int(sock.getsockname()[1]))
    finally:
        server.should_exit = True
        thread.join(10)
