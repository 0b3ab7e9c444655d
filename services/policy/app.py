"""The policy service as an ASGI app."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from fastapi import FastAPI, WebSocket
from fastapi.responses import PlainTextResponse

from services.common.audit_log import AuditError, AuditLog
from services.common.auth import Caller
from services.common.channel import SUBPROTOCOL
from services.common.engine import Engine
from services.common.entry import enter
from services.common.health import health_router
from services.common.logs import ensure_configured, get_logger
from services.common.settings import PolicySettings
from services.policy.admin import models_router
from services.policy.fronts.native import serve_native
from services.policy.fronts.openpi import serve_openpi
from services.policy.fronts.openvla import openvla_router
from services.policy.service import PolicyService

log = get_logger("policy")


def create_app(engine: Engine, settings: PolicySettings) -> FastAPI:
    """An app that serves `engine`'s policy on every websocket path and on `POST /act`.

    `app.state.service` is the `PolicyService`, `app.state.connections` what a server drains, `app.state.limits` the
    sizes it must allow, `app.state.ports` where the further fronts listen (`lerobot`, `groot`) while it runs.
    """
    ensure_configured()
    audit = AuditLog(None if settings.source is None else settings.source.audit)
    service = PolicyService(engine, settings)
    fronts, ports = further_fronts(settings), dict[str, int]()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        _put_start_on_record(service, audit)
        watching = asyncio.create_task(service.gate.watch())
        try:
            async with AsyncExitStack() as stack:
                for name, (front, port) in fronts.items():
                    ports[name] = await stack.enter_async_context(front(service, settings.host, port))
                yield
        finally:
            watching.cancel()
            service.stop()
            audit.close()

    app = FastAPI(title="recap policy service", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service, app.state.connections, app.state.limits = service, service.connections, service.limits
    app.state.ports = ports
    app.include_router(health_router(service.metrics.registry, service.not_ready))
    app.include_router(openvla_router(service))
    app.include_router(models_router(service, audit))

    @app.get("/")
    async def about() -> PlainTextResponse:
        return PlainTextResponse(
            f"recap policy service: {service.engine.name} version {service.engine.version}\n"
            f"websocket: any path (openpi protocol, or subprotocol {SUBPROTOCOL}); POST /act\n"
            f"/livez /readyz /healthz /metrics\n"
        )

    @app.websocket("/{path:path}")
    async def websocket(socket: WebSocket, path: str) -> None:  # openpi accepts any path
        async def serve(caller: Caller) -> None:
            if SUBPROTOCOL in socket.scope["subprotocols"]:
                await serve_native(socket, service, caller)
            else:
                await serve_openpi(socket, service, caller, path)

        await enter(socket, service.gate, service.connections, "act", serve)

    return app


def _put_start_on_record(service: PolicyService, audit: AuditLog) -> None:
    """Which model a start has made live. Robots are served even when that cannot be written."""
    source = service.settings.source
    if source is None:
        return
    live = {"live": service.models.live.identity}
    try:
        audit.write("service", "start", options={"version": source.version}, to=live, result="done")
    except AuditError as error:
        log.error("the start is not on record", error=str(error))


Front = Callable[[PolicyService, str, int], AbstractAsyncContextManager[int]]
"""Serves on a host and port while its block runs; gives the port it took."""


def further_fronts(settings: PolicySettings) -> dict[str, tuple[Front, int]]:
    """The fronts on ports of their own that are asked for. Raises ModuleNotFoundError without the extra `fronts`."""
    fronts: dict[str, tuple[Front, int]] = {}
    if settings.lerobot_port is not None:
        from services.policy.fronts.lerobot_grpc import lerobot_front

        fronts["lerobot"] = lerobot_front, settings.lerobot_port
    if settings.groot_port is not None:
        from services.policy.fronts.groot_zmq import groot_front

        fronts["groot"] = groot_front, settings.groot_port
    return fronts
