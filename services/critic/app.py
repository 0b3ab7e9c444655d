"""The critic service as an ASGI app: values over websocket and POST, an event stream, and the dashboard page."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse

from services.common import json_numpy
from services.common.auth import check_caller
from services.common.channel import SUBPROTOCOL, Channel, Message, Received
from services.common.engine import Engine
from services.common.errors import ServiceError, bad_field, fault_of
from services.common.health import health_router
from services.common.http import read_body
from services.common.logs import ensure_configured
from services.common.settings import CriticSettings
from services.critic.service import CriticService

_PAGE = Path(__file__).parent / "dashboard" / "index.html"
_POLICY = "default-src 'self' 'unsafe-inline'; img-src data:"


def create_app(engine: Engine, settings: CriticSettings) -> FastAPI:
    """An app that serves `engine`'s critic on `/value`, `/value/stream` and the dashboard on `/`.

    `app.state.service`, `app.state.connections` and `app.state.limits` as on the policy app.
    """
    ensure_configured()
    service = CriticService(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        ending = asyncio.create_task(_end_streams(service))
        yield
        ending.cancel()
        service.stop()

    app = FastAPI(title="recap critic service", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service, app.state.connections, app.state.limits = service, service.connections, service.limits
    app.include_router(health_router(service.metrics.registry, service.not_ready))
    page = _PAGE.read_text()

    @app.get("/")
    async def dashboard() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @app.get("/value/stream")
    async def stream(request: Request) -> StreamingResponse:
        check_caller(request.headers, request.query_params, settings.api_key)
        return StreamingResponse(
            service.broadcast.listen(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    @app.post("/value")
    async def post(request: Request) -> JSONResponse:
        try:
            check_caller(request.headers, request.query_params, settings.api_key)
            body = await read_body(request, service.limits.message * 4 // 3)
            message = await asyncio.to_thread(_json, body)
            return JSONResponse(await service.observe(message, request))
        except Exception as error:
            fault = fault_of(error)
            return JSONResponse({"error": fault.to_message()}, status_code=fault.http_status)

    @app.exception_handler(ServiceError)
    async def refused(_: Request, error: ServiceError) -> JSONResponse:
        return JSONResponse({"error": error.fault.to_message()}, status_code=error.fault.http_status)

    @app.websocket("/value")
    async def websocket(socket: WebSocket) -> None:
        try:
            check_caller(socket.headers, socket.query_params, settings.api_key)
        except ServiceError as error:
            await socket.send_denial_response(PlainTextResponse(error.fault.message, error.fault.http_status))
            return
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope["subprotocols"] else None)
        with service.connections.connected(socket), service.metrics.sessions.track_inprogress():
            await _channel(socket, service).serve(service.welcome())

    return app


def _channel(socket: WebSocket, service: CriticService) -> Channel:
    async def observe(received: Received) -> Message:
        return await service.observe(received.body, socket)

    async def reset(received: Received) -> Message:
        return service.reset(received.body)

    async def outcome(received: Received) -> Message:
        return service.outcome(received.body)

    return Channel(
        socket,
        {"observe": observe, "reset": reset, "outcome": outcome},
        limit=service.limits.message,
        concurrent=frozenset({"observe"}),
    )


def _json(data: bytes) -> Message:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise bad_field("bad_message", "body", "a JSON object", str(error)[:120]) from error
    if not isinstance(body, dict):
        raise bad_field("bad_message", "body", "a JSON object", type(body).__name__)
    decoded: Message = json_numpy.decode(body)
    return decoded


async def _end_streams(service: CriticService) -> None:
    await service.connections.stopping.wait()
    service.broadcast.end()
