"""GR00T's policy server (ZeroMQ, msgpack), as the clients of N1.5, N1.6 and N1.7 speak it. A router socket answers any
number of REQ clients at once. There is no `kill`."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio

from services.common.errors import Fault, bad_field, fault_of
from services.policy.fronts.callers import IDLE_S, Callers
from services.policy.fronts.groot_codec import Arrays, pack, unpack
from services.policy.fronts.groot_modality import describe, read_observation, write_actions
from services.policy.pipeline import milliseconds
from services.policy.service import PolicyService
from services.policy.session import Session

DIALECT = "groot"
ENDPOINTS = ("get_action", "get_modality_config", "ping", "reset")
_SMALL = 1 << 14  # bytes; what takes longer to read is read in a thread
_IN_FLIGHT = 256
_QUEUED = 4  # messages of a client that ZeroMQ holds for us
_STOP_S = 1.0
_LINGER_MS = 500


@dataclass(eq=False)
class _Robot:
    """One client. arrays: how it writes them; text_config: N1.5, whose modality configuration is JSON text."""

    session: Session
    arrays: Arrays = Arrays.NPY
    text_config: bool = False
    in_flight: int = 0
    episodes: int = 0


@asynccontextmanager
async def groot_front(service: PolicyService, host: str, port: int, *, idle_s: float = IDLE_S) -> AsyncIterator[int]:
    """Serve while the block runs; gives the port. Raises OSError when it cannot listen there."""
    context = zmq.asyncio.Context()
    router = context.socket(zmq.ROUTER)
    router.set(zmq.IPV6, int(":" in host))
    router.set(zmq.MAXMSGSIZE, service.limits.frame)  # a longer frame ends the connection before it is allocated
    router.set(zmq.RCVHWM, _QUEUED)
    router.set(zmq.HEARTBEAT_IVL, 20_000)  # half-open connections end; clients answer by themselves
    front = _Front(service, router, idle_s)
    try:
        router.bind(f"tcp://{_numeric(host)}:{port or '*'}")
    except zmq.ZMQError as error:
        context.destroy(linger=0)
        raise OSError(f"{host}:{port}: cannot listen here for GR00T's clients; choose another port") from error
    tasks = [asyncio.create_task(front.serve()), asyncio.create_task(front.robots.watch())]
    try:
        yield int(router.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
    finally:
        for task in tasks:
            task.cancel()
        await front.finish()
        context.destroy(linger=_LINGER_MS)


class _Front:
    def __init__(self, service: PolicyService, router: "zmq.asyncio.Socket", idle_s: float) -> None:
        self._service, self._router = service, router
        self._tasks: set[asyncio.Task[None]] = set()
        self.robots = Callers(service, DIALECT, _Robot, busy=lambda robot: robot.in_flight > 0, idle_s=idle_s)

    async def serve(self) -> None:
        """Take messages until cancelled; each is answered by a task of its own."""
        while True:
            parts = await self._router.recv_multipart(copy=False)
            received = time.perf_counter()
            frames, peer = [part.bytes for part in parts], str(parts[-1].get("Peer-Address"))
            if len(self._tasks) >= _IN_FLIGHT:
                fault = Fault("unavailable", f"{_IN_FLIGHT} requests are unanswered")
                await self._refuse(frames[:-1], fault)
                continue
            task = asyncio.create_task(self._handle(frames, peer, received))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Let what is being answered end, then end the sessions."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_S)
        for task in self._tasks:
            task.cancel()
        self.robots.close()

    async def _handle(self, frames: list[bytes], peer: str, received: float) -> None:
        envelope, data = frames[:-1], frames[-1]  # an identity, and the empty frame of a REQ client
        try:
            if len(envelope) > 2 or any(envelope[1:]):
                raise bad_field("bad_message", "message", "one frame", f"{len(frames) - 1} frames")
            reply = await self._answer(envelope[0], data, peer, received)
        except Exception as error:
            await self._refuse(envelope[:2], fault_of(error))
            return
        await self._send([*envelope, reply])

    async def _refuse(self, envelope: list[bytes], fault: Fault) -> None:
        self._service.report(fault, DIALECT)
        said = "Unauthorized: Invalid API token" if fault.code == "unauthorized" else f"{fault.code}: {fault.message}"
        await self._send([*envelope, pack({"error": said}, Arrays.NPY)])

    async def _send(self, frames: list[bytes]) -> None:
        with suppress(zmq.ZMQError):  # a router drops what is for a client that is gone
            await self._router.send_multipart(frames)

    async def _answer(self, identity: bytes, data: bytes, peer: str, received: float) -> bytes:
        limit = self._service.limits.message
        request, arrays = unpack(data, limit) if len(data) < _SMALL else await asyncio.to_thread(unpack, data, limit)
        token = request.get("api_token")
        caller = self._service.gate.admit_key(
            token if isinstance(token, str) else "", peer, "act", where="api_token: expected"
        )
        caller.spend(1, len(data))
        robot = self.robots.of(identity, caller)
        robot.arrays = arrays or robot.arrays
        robot.in_flight += 1
        try:
            with caller.request():
                return await self._endpoint(robot, request, received)
        finally:
            robot.in_flight -= 1

    async def _endpoint(self, robot: _Robot, request: dict[str, Any], received: float) -> bytes:
        endpoint = request.get("endpoint", "get_action")
        if not isinstance(endpoint, str):
            raise bad_field("bad_message", "endpoint", "text", type(endpoint).__name__)
        if endpoint == "get_action":
            with self._service.request(DIALECT, received):
                return await self._act(robot, request.get("data"), received)
        if endpoint == "ping":
            return pack({"status": "ok", "message": "Server is running"}, robot.arrays)
        if endpoint == "reset":
            robot.episodes += 1
            robot.session.episode = str(robot.episodes)
            return pack({}, robot.arrays)
        if endpoint == "get_modality_config":
            spec = self._service.spec
            return pack(describe(spec.robot, spec.chunk, as_text=robot.text_config), robot.arrays)
        raise bad_field("bad_message", "endpoint", f"one of {', '.join(ENDPOINTS)}", repr(endpoint[:40]))

    async def _act(self, robot: _Robot, data: Any, received: float) -> bytes:
        service, session = self._service, robot.session
        spec = service.spec.robot
        observation, form = read_observation(data, spec)
        robot.text_config = not form.listed
        decode_ms = milliseconds(received)
        chunk = await service.act(session, observation)
        timing = service.timing(chunk, received, decode_ms)
        reply = pack(write_actions(chunk.actions, form, spec, {"server_timing": timing}), robot.arrays)
        service.answered(session, observation, timing, received)
        return reply


def _numeric(host: str) -> str:
    """ZeroMQ listens on addresses, not on names."""
    family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    return f"[{address[0]}]" if family == socket.AF_INET6 else str(address[0])
