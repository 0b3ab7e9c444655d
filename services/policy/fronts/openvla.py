"""`POST /act`: the JSON dialects of OpenVLA, OpenVLA-OFT and their relatives. Replies follow the request's dialect."""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from recap_model.observation import ObservationError
from services.common import json_numpy, tracing
from services.common.entry import peer_of, refusal
from services.common.errors import Fault, bad_field, fault_of
from services.common.http import read_body
from services.common.json_body import parse_object
from services.common.observation import Observation
from services.common.settings import Limits
from services.policy.fronts.images import as_hwc_uint8
from services.policy.pipeline import Chunk, milliseconds
from services.policy.service import PolicyService

DIALECT = "openvla"
ERROR_HEADER = "X-Recap-Error"


@dataclass(frozen=True)
class _Dialect:
    """one_action: OpenVLA proper executes one action a request. envelopes: arrays go back as json-numpy. twice: the
    whole payload came as JSON inside JSON, and the reply goes back the same way. legacy: errors are "error", 200."""

    one_action: bool
    envelopes: bool
    twice: bool
    legacy: bool


def openvla_router(service: PolicyService) -> APIRouter:
    """The route, to be included in the policy app."""
    router = APIRouter()

    @router.post("/act")
    async def act(request: Request) -> JSONResponse:
        received = time.perf_counter()
        dialect = _Dialect(False, False, False, False)
        try:
            caller = service.gate.admit(request.headers, peer_of(request), "act")
            caller.spend(1, 0)
            sent = request.headers.get(tracing.FIELD)
            with caller.request(), service.request(DIALECT, received, sent), service.session(DIALECT) as session:
                session.forward = False  # a request that names no robot has no episode for the critic to follow
                body = await read_body(request, service.limits.message * 4 // 3)
                caller.spend(0, len(body))
                payload, dialect = await asyncio.to_thread(_parse, body, service.limits)
                cameras = service.spec.robot.camera_names
                observation = await asyncio.to_thread(_observation, payload, cameras)
                decode_ms = milliseconds(received)
                chunk = await service.act(session, observation)
                timing = service.timing(chunk, received, decode_ms)
                reply = _reply(chunk, dialect, timing["total_ms"])
                service.answered(session, observation, timing, received)
                return reply
        except Exception as error:
            fault = fault_of(error)
            service.report(fault, DIALECT)
            return _error(fault, dialect)

    return router


def _parse(body: bytes, limits: Limits) -> tuple[dict[str, Any], _Dialect]:
    payload = parse_object(body, limits)
    twice = set(payload) == {"encoded"}
    if twice:
        if not isinstance(payload["encoded"], str):
            raise bad_field("bad_message", "encoded", "JSON as text", type(payload["encoded"]).__name__)
        payload = parse_object(payload["encoded"], limits, "encoded")
    envelopes = json_numpy.contains(payload)
    wrapped = isinstance(payload.get("observation"), dict)
    legacy = envelopes and not wrapped
    return payload, _Dialect("image" in payload and legacy, envelopes, twice, legacy)


def _observation(encoded: Mapping[str, Any], cameras: tuple[str, ...]) -> Observation:
    payload = json_numpy.decode(encoded)
    wrapped = payload.get("observation")
    body: Mapping[str, Any] = {**payload, **wrapped} if isinstance(wrapped, dict) else payload
    frames: Mapping[str, Any] = body["images"] if isinstance(body.get("images"), dict) else {}
    images = {}
    for index, camera in enumerate(cameras):
        names = [camera, f"{camera}_image"] + (["image", "full_image"] if index == 0 else [])
        frame = next((source[name] for source in (frames, body) for name in names if name in source), None)
        if isinstance(frame, list):
            frame = _from_list(frame, camera)
        if frame is not None:
            images[camera] = as_hwc_uint8(frame, f"images[{camera}]")
    prompt = next((body[key] for key in ("instruction", "prompt", "task") if key in body), None)
    return Observation(images, body.get("state"), prompt)


def _from_list(frame: list[Any], camera: str) -> Any:
    try:
        array = np.asarray(frame)
    except ValueError as error:
        raise ObservationError(f"images[{camera}]", "nested lists of equal lengths", str(error)) from error
    if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8)
    return array


def _reply(chunk: Chunk, dialect: _Dialect, total_ms: float) -> JSONResponse:
    if not dialect.envelopes:
        answer: Any = {"actions": chunk.actions.tolist(), "latency_ms": total_ms}
    elif dialect.one_action:
        answer = json_numpy.encode(chunk.actions[0])
    elif dialect.legacy:
        answer = [json_numpy.encode(action) for action in chunk.actions]
    else:
        answer = {"actions": json_numpy.encode(chunk.actions), "latency_ms": total_ms}
    return JSONResponse(json.dumps(answer) if dialect.twice else answer)


def _error(fault: Fault, dialect: _Dialect) -> JSONResponse:
    if dialect.legacy:  # what their clients test for; the reason travels beside it
        reason = f"{fault.code}: {fault.message}".encode("ascii", "replace").decode().replace("\n", " ")
        shown = "".join(c for c in reason if c.isprintable())[:500]
        return JSONResponse("error", headers={ERROR_HEADER: shown, **fault.http_headers})
    return refusal(fault)
