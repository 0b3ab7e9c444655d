"""The door of a websocket: admitted before the upgrade, ended with a typed error when its key is good no more."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress

from fastapi import Request, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse

from recap_client import wire
from services.common.auth import Caller, Gate
from services.common.channel import SUBPROTOCOL, error_message
from services.common.drain import Connections
from services.common.errors import Fault, ServiceError
from services.common.keys import Scope

POLICY_VIOLATION = 1008
_PATIENCE_S = 0.5


async def enter(
    socket: WebSocket, gate: Gate, connections: Connections, scope: Scope, serve: Callable[[Caller], Awaitable[None]]
) -> None:
    """Accept a websocket and `serve` it, or answer its handshake with the status and the words of the refusal."""
    native = SUBPROTOCOL in socket.scope["subprotocols"]
    with ExitStack() as held:
        try:
            caller = gate.admit(socket.headers, peer_of(socket), scope)
            held.enter_context(caller.session())
        except ServiceError as error:
            fault = error.fault
            await socket.send_denial_response(PlainTextResponse(fault.message, fault.http_status, fault.http_headers))
            return
        await socket.accept(SUBPROTOCOL if native else None)
        held.enter_context(connections.connected(socket))
        held.enter_context(gate.until_revoked(caller, lambda fault: _end(socket, native, fault)))
        await serve(caller)


def peer_of(connection: Request | WebSocket) -> str:
    """The address that a connection comes from; that of the proxy where there is one."""
    return connection.client.host if connection.client is not None else "unknown"


def refusal(fault: Fault) -> JSONResponse:
    """`{"error": {...}}` with its status."""
    return JSONResponse({"error": fault.to_message()}, fault.http_status, fault.http_headers)


async def _end(socket: WebSocket, native: bool, fault: Fault) -> None:
    with suppress(Exception):  # it may be gone already, or not reading
        async with asyncio.timeout(_PATIENCE_S):
            if native:
                await socket.send_bytes(wire.pack(error_message(fault, None)))
            else:
                await socket.send_text(f"{fault.code}: {fault.message}")
            await socket.close(POLICY_VIOLATION, f"{fault.code}; details in the previous frame")
