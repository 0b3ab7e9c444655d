"""`/models`: which models are loaded, and changing them while robots are served. For admins only, and on record."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from services.common.audit_log import AuditError, AuditLog
from services.common.entry import peer_of, refusal
from services.common.errors import bad_field, fault_of
from services.common.http import read_body
from services.common.json_body import parse_object
from services.common.settings import ADMIN_KEY_VARIABLE
from services.policy.models import STATES, ModelRefused, State, Wanted
from services.policy.service import PolicyService

_BODY = 1 << 14
_FIELDS = {
    "load": {"state", "version", "path", "share", "every", "force"},
    "promote": {"state", "force"},
    "rollback": set[str](),
    "unload": set[str](),
}


@dataclass(frozen=True)
class _Who:
    """name: of the key, never the key itself."""

    name: str
    peer: str


def models_router(service: PolicyService, audit: AuditLog) -> APIRouter:
    """`GET /models` and `POST /models/{load|promote|rollback|unload}`, to be included in the policy app."""
    router, admin = APIRouter(), _Admin(service, audit)

    @router.get("/models")
    async def listing(request: Request) -> JSONResponse:
        return await admin.answer(request, None)

    @router.post("/models/{action}")
    async def change(request: Request, action: str) -> JSONResponse:
        return await admin.answer(request, action)

    return router


class _Admin:
    def __init__(self, service: PolicyService, audit: AuditLog) -> None:
        self._service, self._audit = service, audit
        source = service.settings.source
        self._open = service.gate.asks or (source is not None and source.admin_key is not None)

    async def answer(self, request: Request, action: str | None) -> JSONResponse:
        service = self._service
        if not self._open:
            message = f"models: closed; set {ADMIN_KEY_VARIABLE} in the environment of the service to open it to admins"
            return JSONResponse({"error": {"code": "not_found", "message": message}}, 404)
        try:
            peer = peer_of(request)
            who = _Who(service.gate.admit(request.headers, peer, "admin").name, peer)
            if action is None:
                return JSONResponse(service.models.listing())
            if action not in _FIELDS:
                raise bad_field("bad_message", "action", f"one of {', '.join(_FIELDS)}", repr(action[:40]))
            body = await read_body(request, _BODY)
            options = _checked(action, parse_object(body, service.limits) if body else {})
            return await self._change(who, action, options)
        except (ModelRefused, AuditError) as error:
            status, code = (error.status, "refused") if isinstance(error, ModelRefused) else (500, "internal")
            return JSONResponse({"error": {"code": code, "message": str(error)}}, status)
        except Exception as error:
            return refusal(fault_of(error))

    async def _change(self, who: _Who, action: str, options: Mapping[str, Any]) -> JSONResponse:
        models, before = self._service.models, self._service.models.live.identity
        details = {"peer": who.peer, "options": dict(options), "from": before}
        await asyncio.to_thread(self._audit.write, who.name, action, **details, result="begun")  # or nothing is changed
        try:
            if action == "load":
                listing = await models.load(Wanted(**options))
            else:
                quick: dict[str, Callable[[], dict[str, Any]]] = {
                    "promote": lambda: models.promote(options.get("state"), force=bool(options.get("force"))),
                    "rollback": models.rollback,
                    "unload": models.unload_shadow,
                }
                listing = quick[action]()
        except BaseException as error:
            self._service.metrics.model_changes.labels(action, "refused").inc()
            await asyncio.to_thread(self._audit.write, who.name, action, **details, result=f"refused: {error}"[:500])
            raise
        self._service.metrics.model_changes.labels(action, "done").inc()
        after = {part: listing[part] for part in ("live", "canary", "shadow", "previous")}
        try:
            await asyncio.to_thread(self._audit.write, who.name, action, **details, to=after, result="done")
        except AuditError as error:
            raise AuditError(f"the change is made, but its end is not on record: {error}") from error
        return JSONResponse(listing)


def _checked(action: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a change. Raises ServiceError that names the one at fault."""
    if unknown := sorted(set(body) - _FIELDS[action]):
        raise bad_field("bad_message", unknown[0][:40], f"one of {sorted(_FIELDS[action])}", "an unknown option")
    options = {name: value for name, value in body.items() if value is not None}
    known = STATES if action == "load" else ("shadow", "canary")
    if (action == "load" or "state" in options) and options.get("state") not in known:
        raise bad_field("bad_message", "state", f"one of {', '.join(known)}", repr(options.get("state"))[:40])
    for name, kind, most in (("version", int, 2**31), ("every", int, 10**6)):
        value = options.get(name, 1)
        if type(value) is not kind or not 1 <= value <= most:
            raise bad_field("bad_message", name, "a whole number from 1", repr(value)[:40])
    share = options.get("share", 0.1)
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise bad_field("bad_message", "share", "a number from 0 to 1", repr(share)[:40])
    for name, wanted in (("path", str), ("force", bool)):
        if name in options and type(options[name]) is not wanted:
            raise bad_field("bad_message", name, wanted.__name__, type(options[name]).__name__)
    if "state" in options:
        options["state"] = cast("State", options["state"])
    return options
