"""The policy service as an ASGI app."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, WebSocket
from fastapi.responses import PlainTextResponse

from services.common.auth import check_caller
from services.common.channel import SUBPROTOCOL
from services.common.engine import Engine
from services.common.errors import ServiceError
from services.common.health import health_router
from services.common.logs import ensure_configured
from services.common.settings import PolicySettings
from services.policy.fronts.native import serve_native
from services.policy.fronts.openpi import serve_openpi
from services.policy.fronts.openvla import openvla_router
from services.policy.service import PolicyService


def create_app(engine: Engine, settings: PolicySettings) -> FastAPI:
    """An app that serves `engine`'s policy on every websocket path and on `POST /act`.

    `app.state.service` is the `PolicyService`, `app.state.connections` what a server drains, `app.state.limits` the
    sizes it must allow.
    """
    ensure_configured()
    service = PolicyService(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="recap policy service", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service, app.state.connections, app.state.limits = service, service.connections, service.limits
    app.include_router(health_router(service.metrics.registry, service.not_ready))
    app.include_router(openvla_router(service))

    @app.get("/")
    async def about() -> PlainTextResponse:
        return PlainTextResponse(
            f"recap policy service: {engine.name} version {engine.version}\n"
            f"websocket: any path (openpi protocol, or subprotocol {SUBPROTOCOL}); POST /act\n"
            f"/livez /readyz /healthz /metrics\n"
        )

    @app.websocket("/{path:path}")
    async def websocket(socket: WebSocket, path: str) -> None:  # noqa: ARG001 - openpi accepts any path
        try:
            check_caller(socket.headers, socket.query_params, settings.api_key)
        except ServiceError as error:
            await socket.send_denial_response(PlainTextResponse(error.fault.message, error.fault.http_status))
            return
        native = SUBPROTOCOL in socket.scope["subprotocols"]
        await socket.accept(SUBPROTOCOL if native else None)
        with service.connections.connected(socket):
            await (serve_native if native else serve_openpi)(socket, service)

    return app
