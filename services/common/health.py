"""Is it alive, is it ready, and the numbers: the same four addresses on both services."""

from collections.abc import Callable

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry

from services.common import metrics


def health_router(registry: CollectorRegistry, not_ready: Callable[[], str | None]) -> APIRouter:
    """`/livez` and `/healthz` (openpi's name) say that the event loop turns; `/readyz` that requests will be answered;
    so does `recap_ready` in `/metrics`.

    not_ready: None when ready, else the reason.
    """
    router = APIRouter()
    metrics.watch_readiness(registry, lambda: not_ready() is None)

    @router.get("/livez")
    async def livez() -> PlainTextResponse:
        return PlainTextResponse("OK\n")

    @router.get("/healthz")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("OK\n")

    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        reason = not_ready()
        return JSONResponse({"ready": reason is None, "reason": reason}, status_code=200 if reason is None else 503)

    @router.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(registry), headers={"Content-Type": metrics.CONTENT_TYPE})

    return router
