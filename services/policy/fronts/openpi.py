"""openpi's websocket protocol, as an unmodified `openpi-client` speaks it: a metadata frame, then observation in and
actions out; an error is a text frame and the end of the connection (1011). RoboArena's messages are told by their
`endpoint` and may be mixed with openpi's."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import WebSocket, WebSocketDisconnect

from recap_client import wire
from recap_model.observation import ObservationError
from services.common.auth import Caller
from services.common.channel import Message, decode
from services.common.errors import Fault, bad_field, fault_of
from services.common.observation import Observation, decoded, with_text_keys
from services.policy.fronts import roboarena
from services.policy.fronts.images import as_hwc_uint8
from services.policy.pipeline import milliseconds
from services.policy.service import PolicyService
from services.policy.session import Session

DIALECT = "openpi"
_LARGE = 1 << 20  # bytes; scaling float frames above this would keep other robots waiting
_STATE_KEYS = ("state", "observation/state", "observation.state")
_IMAGE_PREFIXES = ("observation/images/", "observation.images.", "observation/", "observation.")


@dataclass(frozen=True)
class _Asked:
    """One message. size: of its bytes; received: `time.perf_counter` of the last one."""

    body: Message
    dialect: str
    reset: bool
    size: int
    received: float


async def serve_openpi(socket: WebSocket, service: PolicyService, caller: Caller, path: str = "") -> None:
    """Answer one connection until it ends. path: without its leading slash; RoboArena's has its own handshake."""
    robot = service.spec.robot
    metadata = roboarena.server_config(robot) if path.strip("/") == roboarena.PATH else service.welcome()
    await socket.send_bytes(wire.pack(metadata))
    with service.session(DIALECT) as session, suppress(WebSocketDisconnect, RuntimeError):
        previous_ms: float | None = None
        while (event := await socket.receive())["type"] == "websocket.receive":
            received = time.perf_counter()
            dialect = DIALECT
            try:
                caller.spend(1, len(event.get("bytes") or b""))
                asked = _asked(service, event.get("bytes"), received)
                dialect = asked.dialect
                if asked.reset:
                    await socket.send_text(_reset(service, session, asked.body))
                    continue
                with caller.request(), service.request(dialect, received):
                    reply = await _answer(service, session, asked, previous_ms)
            except Exception as error:
                await _refuse(socket, service, fault_of(error), dialect)
                return
            await socket.send_bytes(reply)
            previous_ms = milliseconds(received)


def _asked(service: PolicyService, data: bytes | None, received: float) -> _Asked:
    try:
        if data is None:
            raise bad_field("bad_message", "message", "a binary frame", "a text frame")
        body = decode(data, service.limits.message)
        endpoint = roboarena.endpoint(body)
    except Exception as error:
        service.metrics.count(DIALECT, fault_of(error).code)
        raise
    dialect = DIALECT if endpoint is None else roboarena.DIALECT
    return _Asked(body, dialect, endpoint == "reset", len(data), received)


def _reset(service: PolicyService, session: Session, body: Message) -> str:
    number = int(session.episode) + 1 if session.episode.isdecimal() else 0
    session.episode = roboarena.session_id(body) or str(number)
    service.tell_critic(session, {"type": "reset", "robot": session.robot, "episode": session.episode, "task": ""})
    return roboarena.RESET_REPLY


async def _answer(service: PolicyService, session: Session, asked: _Asked, previous_ms: float | None) -> bytes:
    arena, received = asked.dialect == roboarena.DIALECT, asked.received
    robot = service.spec.robot
    body = roboarena.translated(asked.body, robot) if arena else asked.body
    if asked.size < _LARGE:
        raw = read_observation(body, robot.camera_names)
    else:
        raw = await asyncio.to_thread(read_observation, body, robot.camera_names)
    observation = await decoded(raw, robot.cameras)
    decode_ms = milliseconds(received)
    chunk = await service.act(session, observation)
    timing = service.timing(chunk, received, decode_ms)
    shown = timing if previous_ms is None else timing | {"prev_total_ms": previous_ms}
    # Every array has the chunk as its leading dimension (openpi's ActionChunkBroker slices all of them).
    answer = {"actions": chunk.actions, "server_timing": shown, "policy_timing": {"infer_ms": timing["infer_ms"]}}
    reply = wire.pack(chunk.actions if arena else answer)
    service.answered(session, raw, timing, received)
    return reply


async def _refuse(socket: WebSocket, service: PolicyService, fault: Fault, dialect: str) -> None:
    service.report(fault, dialect)
    with suppress(WebSocketDisconnect, RuntimeError):
        await socket.send_text(f"{fault.code}: {fault.message}")
        await socket.close(1011, f"{fault.code}; details in the previous frame"[:120])


def read_observation(body: Mapping[str, Any], cameras: tuple[str, ...]) -> Observation:
    """Find state, frames and prompt under the names in use (ALOHA, LIBERO, LeRobot styles). Raises ObservationError."""
    nested = body.get("observation")
    if isinstance(nested, Mapping):
        body = {**with_text_keys(nested), **body}
    state = next((body[key] for key in _STATE_KEYS if key in body), None)
    if state is None:
        raise ObservationError("state", f"one of the keys {', '.join(_STATE_KEYS)}", f"keys {_shown(body)}")
    prompt = body.get("prompt", body.get("task"))
    if isinstance(prompt, bytes):
        prompt = prompt.decode("utf-8", "replace")
    if isinstance(prompt, (np.str_, np.bytes_)) or (isinstance(prompt, np.ndarray) and prompt.size == 1):
        prompt = str(np.asarray(prompt).astype(str).item())
    if not isinstance(prompt, str):
        raise ObservationError("prompt", "the task as text under the key prompt", f"keys {_shown(body)}")
    return Observation(_frames(body, cameras), state, prompt)


def _frames(body: Mapping[str, Any], cameras: tuple[str, ...]) -> dict[str, Any]:
    images = body.get("images")
    named = with_text_keys(images) if isinstance(images, Mapping) else {}
    for camera in cameras:
        if camera not in named:
            key = next((prefix + camera for prefix in _IMAGE_PREFIXES if prefix + camera in body), None)
            if key is not None:
                named[camera] = body[key]
    return {camera: as_hwc_uint8(frame, f"images[{camera}]") for camera, frame in named.items()}


def _shown(body: Mapping[str, Any]) -> list[str]:
    return sorted(key[:40] for key in body)[:20]
