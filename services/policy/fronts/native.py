"""`recap.v1` on the policy service: numbered requests, deadlines, JPEG frames, outcomes; errors keep the connection."""

import time

from fastapi import WebSocket

from recap_client import wire
from services.common import tracing
from services.common.auth import Caller
from services.common.channel import SUBPROTOCOL, Channel, Message, Received, number, text, whole
from services.common.errors import ServiceError, bad_field
from services.common.handshake import check_spec
from services.common.observation import decoded, read_observation
from services.policy.chaining import read_previous, read_switched
from services.policy.pipeline import milliseconds
from services.policy.service import PolicyService
from services.policy.session import Session


async def serve_native(socket: WebSocket, service: PolicyService, caller: Caller) -> None:
    """Answer one connection until it ends."""
    with service.session(SUBPROTOCOL) as session:
        front = _Front(service, session)
        channel = Channel(
            socket,
            {"act": front.act, "reset": front.reset, "outcome": front.outcome},
            caller,
            limit=service.limits.message,
            concurrent=frozenset({"act"}),
        )
        await channel.serve(service.welcome())


class _Front:
    def __init__(self, service: PolicyService, session: Session) -> None:
        self._service, self._session = service, session
        self._told = service.models.live.identity  # by the welcome, which follows at once

    async def act(self, received: Received) -> bytes:
        ticket = self._session.arrive()  # before the first await: arrival decides which observation is the newest
        with self._service.request(SUBPROTOCOL, received.at, received.body.get(tracing.FIELD)):
            return await self._act(received.body, received.at, ticket)

    async def _act(self, body: Message, at: float, ticket: int) -> bytes:
        service, session = self._service, self._session
        seq, seed = whole(body, "seq") or 0, whole(body, "seed")
        t_obs = number(body, "t_obs", 0.0) or 0.0
        deadline_ms, runs_out_ms = number(body, "deadline_ms"), number(body, "runs_out_ms")
        session.robot = text(body, "robot", session.robot, limit=64)
        session.episode = text(body, "episode", session.episode, limit=128)
        session.forward = body.get("forward") is not False
        previous = read_previous(body, service.spec)
        service.switched(read_switched(body))
        raw = read_observation(body)
        observation = await decoded(raw, service.spec.robot.cameras)
        decode_ms = milliseconds(at)
        chunk = await service.act(
            session,
            observation,
            ticket=ticket,
            seed=seed,
            seq=seq,
            deadline_s=_left_s(deadline_ms, decode_ms),
            runs_out_s=_left_s(runs_out_ms, decode_ms),
            previous=previous,
        )
        timing = service.timing(chunk, at, decode_ms)
        reply = {
            "type": "chunk",
            "seq": seq,
            "t_obs": t_obs,
            "actions": chunk.actions,
            "server_timing": timing,
            "t_server": time.monotonic(),
        }
        if session.model is not self._told:
            reply["model"] = session.model
        packed = wire.pack(reply)
        service.answered(session, raw, timing, at, seq=seq, t_obs=t_obs)
        return packed

    async def reset(self, received: Received) -> Message:
        body, session = received.body, self._session
        try:
            check_spec(body, self._service.spec.robot)
        except ServiceError as error:
            self._service.metrics.count(SUBPROTOCOL, error.fault.code)
            raise
        session.robot = text(body, "robot", session.robot, limit=64)
        session.episode = text(body, "episode", session.episode, limit=128)
        session.task = text(body, "task", "", limit=2000)
        session.forward = body.get("forward") is not False
        self._service.tell_critic(
            session, {"type": "reset", "robot": session.robot, "episode": session.episode, "task": session.task}
        )
        return {"type": "ok"}

    async def outcome(self, received: Received) -> Message:
        body, session = received.body, self._session
        success = body.get("success")
        if success is not None and not isinstance(success, bool):
            raise bad_field("bad_message", "success", "true, false or null", type(success).__name__)
        self._service.tell_critic(
            session,
            {
                "type": "outcome",
                "robot": text(body, "robot", session.robot, limit=64),
                "episode": text(body, "episode", session.episode, limit=128),
                "success": success,
            },
        )
        return {"type": "ok"}


def _left_s(ms: float | None, passed_ms: float) -> float | None:
    """Seconds that are left of `ms` milliseconds; None stays None."""
    return None if ms is None else (ms - passed_ms) / 1000
