"""The critic service as an ASGI app: values over websocket and POST, an event stream, and the dashboard page."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from services.common import json_numpy
from services.common.auth import Caller, Refused
from services.common.channel import Channel, Message, Received
from services.common.engine import Engine
from services.common.entry import enter, peer_of, refusal
from services.common.errors import Fault, ServiceError, fault_of
from services.common.health import health_router
from services.common.http import read_body
from services.common.json_body import parse_object
from services.common.logs import ensure_configured
from services.common.quota import OverQuota
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
        tasks = [asyncio.create_task(_end_streams(service)), asyncio.create_task(service.gate.watch())]
        yield
        for task in tasks:
            task.cancel()
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
        key = request.query_params.get("api_key")
        caller = service.gate.admit(request.headers, peer_of(request), "value", query_key=key)
        caller.spend(1, 0)
        return StreamingResponse(
            _listen(service, caller),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    @app.post("/value")
    async def post(request: Request) -> JSONResponse:
        try:
            caller = service.gate.admit(request.headers, peer_of(request), "value")
            caller.spend(1, 0)
            with caller.request():
                body = await read_body(request, service.limits.message * 4 // 3)
                caller.spend(0, len(body))
                message = await asyncio.to_thread(lambda: json_numpy.decode(parse_object(body, service.limits)))
                return JSONResponse(await service.observe(message, request))
        except Exception as error:
            return refusal(fault_of(error))

    @app.exception_handler(ServiceError)
    async def refused(_: Request, error: ServiceError) -> JSONResponse:
        return refusal(error.fault)

    @app.websocket("/value")
    async def websocket(socket: WebSocket) -> None:
        async def serve(caller: Caller) -> None:
            with service.metrics.sessions.track_inprogress():
                await _channel(socket, service, caller).serve(service.welcome())

        await enter(socket, service.gate, service.connections, "value", serve)

    return app


def _channel(socket: WebSocket, service: CriticService, caller: Caller) -> Channel:
    async def observe(received: Received) -> Message:
        return await service.observe(received.body, socket)

    async def reset(received: Received) -> Message:
        return service.reset(received.body)

    async def outcome(received: Received) -> Message:
        return service.outcome(received.body)

    return Channel(
        socket,
        {"observe": observe, "reset": reset, "outcome": outcome},
        caller,
        limit=service.limits.message,
        concurrent=frozenset({"observe"}),
    )


async def _listen(service: CriticService, caller: Caller) -> AsyncIterator[str]:
    """The events, until the caller's key is good no more."""

    async def wake(_: Fault) -> None:
        service.broadcast.wake()

    with suppress(Refused, OverQuota), caller.session(), service.gate.until_revoked(caller, wake):
        async with aclosing(service.broadcast.listen()) as texts:
            async for text in texts:
                caller.check()
                yield text


async def _end_streams(service: CriticService) -> None:
    await service.connections.stopping.wait()
    service.broadcast.end()
