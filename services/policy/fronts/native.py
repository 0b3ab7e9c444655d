"""`recap.v1` on the policy service: numbered requests, deadlines, JPEG frames, outcomes; errors keep the connection."""

import time

from fastapi import WebSocket

from recap_client import wire
from services.common.channel import SUBPROTOCOL, Channel, Message, Received, number, text, whole
from services.common.errors import bad_field
from services.common.observation import decoded, read_observation
from services.policy.pipeline import milliseconds
from services.policy.service import PolicyService
from services.policy.session import Session


async def serve_native(socket: WebSocket, service: PolicyService) -> None:
    """Answer one connection until it ends."""
    with service.session(SUBPROTOCOL) as session:
        front = _Front(service, session)
        channel = Channel(
            socket,
            {"act": front.act, "reset": front.reset, "outcome": front.outcome},
            limit=service.limits.message,
            concurrent=frozenset({"act"}),
        )
        await channel.serve(service.welcome())


class _Front:
    def __init__(self, service: PolicyService, session: Session) -> None:
        self._service, self._session = service, session

    async def act(self, received: Received) -> bytes:
        ticket = self._session.arrive()  # before the first await: arrival decides which observation is the newest
        with self._service.request(SUBPROTOCOL):
            return await self._act(received.body, received.at, ticket)

    async def _act(self, body: Message, at: float, ticket: int) -> bytes:
        service, session = self._service, self._session
        seq, seed = whole(body, "seq") or 0, whole(body, "seed")
        t_obs = number(body, "t_obs", 0.0) or 0.0
        deadline_ms = number(body, "deadline_ms")
        session.robot = text(body, "robot", session.robot, limit=64)
        session.episode = text(body, "episode", session.episode, limit=128)
        session.forward = body.get("forward") is not False
        raw = read_observation(body)
        observation = await decoded(raw, service.spec.robot.camera_names)
        decode_ms = milliseconds(at)
        left_s = None if deadline_ms is None else (deadline_ms - decode_ms) / 1000
        chunk = await service.act(session, observation, ticket=ticket, seed=seed, seq=seq, deadline_s=left_s)
        timing = service.timing(chunk, at, decode_ms)
        reply = wire.pack(
            {
                "type": "chunk",
                "seq": seq,
                "t_obs": t_obs,
                "actions": chunk.actions,
                "server_timing": timing,
                "t_server": time.monotonic(),
            }
        )
        service.answered(session, raw, timing, at, seq=seq, t_obs=t_obs)
        return reply

    async def reset(self, received: Received) -> Message:
        body, session = received.body, self._session
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
