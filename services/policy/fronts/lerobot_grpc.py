"""LeRobot's asynchronous inference (`transport.AsyncInference`, gRPC), as an unmodified `RobotClient` speaks it.

Differs from LeRobot's own server where that one is at fault: pickles are read as data; any number of robots at once,
each with the newest of its own observations; every observation is answered, as soon as the engine has (no filter by
joint distance, no floor of 33 ms); the model is the service's, whatever the client names; errors are gRPC statuses.
"""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from services.common.auth import Caller, address
from services.common.errors import Fault, ServiceError, fault_of
from services.common.tls import grpc_credentials
from services.policy.fronts.callers import IDLE_S, Callers
from services.policy.fronts.lerobot_messages import (
    Seen,
    Setup,
    read_setup,
    read_timed_observation,
    receive_chunks,
    write_bytes,
)
from services.policy.fronts.pickle_actions import write_actions
from services.policy.pipeline import milliseconds
from services.policy.service import PolicyService
from services.policy.session import Session

DIALECT = "lerobot"
WAIT_S = 2.0  # as LeRobot's server: GetActions without an observation is answered with nothing
_RECEIVE_S = 10.0
_STOP_S = 1.0
_MESSAGE = 4 << 20  # LeRobot's own limit; observations come in pieces of half of it
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second server takes the same port without a word
    ("grpc.max_receive_message_length", _MESSAGE),
    ("grpc.max_send_message_length", _MESSAGE),
    ("grpc.max_concurrent_streams", 8),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)
_RPCS = 1024
_STATUS = {
    "bad_observation": grpc.StatusCode.INVALID_ARGUMENT,
    "bad_message": grpc.StatusCode.INVALID_ARGUMENT,
    "too_large": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
    "superseded": grpc.StatusCode.ABORTED,
    "shutting_down": grpc.StatusCode.UNAVAILABLE,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "unauthorized": grpc.StatusCode.UNAUTHENTICATED,
    "forbidden": grpc.StatusCode.PERMISSION_DENIED,
    "rate_limited": grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@dataclass(frozen=True)
class _Waiting:
    seen: Seen
    ticket: int
    decode_s: float


@dataclass(eq=False)
class _Robot:
    """One connection. shared: two robots were found on it, whose chunks could not be told apart."""

    session: Session
    setup: Setup = field(default_factory=Setup)
    newest: _Waiting | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    receiving: bool = False
    fetching: bool = False
    shared: bool = False
    episodes: int = 0

    def offer(self, waiting: _Waiting) -> None:
        if self.newest is None or self.newest.ticket < waiting.ticket:
            self.newest = waiting
        self.arrived.set()

    def begin(self) -> None:
        """A client says it is ready: what waits is of another episode."""
        self.newest, self.shared = None, False
        self.arrived.clear()
        self.episodes += 1
        self.session.episode = str(self.episodes)

    def check_alone(self) -> None:
        if self.shared:
            raise ServiceError(
                "bad_message",
                "connection: expected one robot on it, got two, whose actions cannot be told apart; "
                "run each robot's client in a process of its own, without a proxy that joins connections",
            )


@asynccontextmanager
async def lerobot_front(
    service: PolicyService, host: str, port: int, *, wait_s: float = WAIT_S, idle_s: float = IDLE_S
) -> AsyncIterator[int]:
    """Serve while the block runs; gives the port. Raises OSError when it cannot listen there."""
    front = _Front(service, wait_s, idle_s)
    server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=_RPCS)
    server.add_generic_rpc_handlers((front.handlers(),))
    at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        tls = service.settings.tls
        bound = server.add_insecure_port(at) if tls is None else server.add_secure_port(at, grpc_credentials(tls))
    except RuntimeError as error:
        raise OSError(f"{at}: cannot listen here for LeRobot's clients; choose another port") from error
    await server.start()
    watch = asyncio.create_task(front.robots.watch())
    try:
        yield bound
    finally:
        watch.cancel()
        front.stop()
        await server.stop(_STOP_S)
        front.robots.close()


class _Front:
    def __init__(self, service: PolicyService, wait_s: float, idle_s: float) -> None:
        self._service, self._wait_s = service, wait_s
        self._stopping = False
        self.robots = Callers(
            service, DIALECT, _Robot, busy=lambda robot: robot.fetching or robot.receiving, idle_s=idle_s
        )

    def handlers(self) -> grpc.GenericRpcHandler:
        """The four methods, on bytes: what is wrong with a message is ours to say, not a deserializer's."""
        unary = {"Ready": self.ready, "SendPolicyInstructions": self.set_up, "GetActions": self.get_actions}
        methods = {name: grpc.unary_unary_rpc_method_handler(self._guarded(call)) for name, call in unary.items()}
        methods["SendObservations"] = grpc.stream_unary_rpc_method_handler(self._guarded(self.send_observations))
        return grpc.method_handlers_generic_handler("transport.AsyncInference", methods)

    def stop(self) -> None:
        self._stopping = True
        for robot in self.robots.states():
            robot.arrived.set()

    def _guarded(self, call: Callable[[Any, _Robot], Awaitable[bytes]]) -> Callable[[Any, Any], Awaitable[bytes]]:
        async def answer(request: Any, context: Any) -> bytes:
            try:
                caller = self._service.gate.admit(_metadata(context), address(context.peer()), "act")
                whole = isinstance(request, bytes)
                caller.spend(1, len(request) if whole else 0)
                self._check_serving()
                robot = self.robots.of(context.peer(), caller)
                with caller.request():
                    return await call(request if whole else _metered(request, caller), robot)
            except Exception as error:
                fault = fault_of(error)
                self._report(fault, call == self.get_actions)
                message = fault.message.encode("ascii", "replace").decode()[:1000]
                await context.abort(_STATUS.get(fault.code, grpc.StatusCode.INTERNAL), f"{fault.code}: {message}")
                raise

        return answer

    def _check_serving(self) -> None:
        if self._stopping or self._service.connections.draining:
            raise ServiceError("shutting_down", "the service is shutting down; connect again in a moment")

    def _report(self, fault: Fault, counted: bool) -> None:
        if not counted:  # a request for actions counts itself
            self._service.metrics.count(DIALECT, fault.code)
        self._service.report(fault, DIALECT)

    async def ready(self, _: bytes, robot: _Robot) -> bytes:
        if robot.fetching:  # a client says so before it asks for actions: this is another one
            robot.shared = True
            robot.arrived.set()
        else:
            robot.begin()
        robot.check_alone()
        return b""

    async def set_up(self, message: bytes, robot: _Robot) -> bytes:
        robot.setup = await asyncio.to_thread(read_setup, message, self._service.spec.robot)
        return b""

    async def send_observations(self, messages: AsyncIterable[bytes], robot: _Robot) -> bytes:
        robot.check_alone()
        if robot.receiving:  # a client sends one at a time; more would be memory without a bound
            raise ServiceError("unavailable", "an observation of this robot is still being received")
        robot.receiving = True
        try:
            async with asyncio.timeout(_RECEIVE_S):
                data = await receive_chunks(messages, self._service.limits.message)
            received, ticket = time.perf_counter(), robot.session.arrive()
            spec = self._service.spec.robot
            seen = await asyncio.to_thread(read_timed_observation, data, robot.setup, spec)
        except TimeoutError:
            raise ServiceError("deadline", f"the observation did not arrive within {_RECEIVE_S:.0f} s") from None
        finally:
            robot.receiving = False
        robot.offer(_Waiting(seen, ticket, milliseconds(received) / 1000))
        return b""

    async def get_actions(self, _: bytes, robot: _Robot) -> bytes:
        if robot.fetching:  # a client has one such request open
            robot.shared = True
            robot.arrived.set()
        robot.check_alone()
        robot.fetching = True
        try:
            waiting = await self._next(robot)
            if waiting is None:
                return b""
            picked_up = time.perf_counter() - waiting.decode_s  # not the time for which the client did not ask
            with self._service.request(DIALECT, picked_up):
                return await self._answer(robot, waiting, picked_up)
        finally:
            robot.fetching = False

    async def _next(self, robot: _Robot) -> _Waiting | None:
        with suppress(TimeoutError):
            await asyncio.wait_for(robot.arrived.wait(), self._wait_s)
        robot.check_alone()
        self._check_serving()
        robot.arrived.clear()
        waiting, robot.newest = robot.newest, None
        return waiting

    async def _answer(self, robot: _Robot, waiting: _Waiting, picked_up: float) -> bytes:
        service, session, seen = self._service, robot.session, waiting.seen
        chunk = await service.act(session, seen.observation, ticket=waiting.ticket)
        robot.check_alone()
        timing = service.timing(chunk, picked_up, 1000 * waiting.decode_s)
        actions = chunk.actions[: robot.setup.actions]
        period = 1 / service.spec.robot.control_hz
        reply = write_actions(actions, seen.module, seen.timestamp, seen.timestep, period)
        service.answered(session, seen.observation, timing, picked_up, seq=seen.timestep)
        return write_bytes(1, reply)


async def _metered(messages: AsyncIterable[bytes], caller: Caller) -> AsyncIterator[bytes]:
    async for message in messages:
        caller.spend(0, len(message))
        yield message


def _metadata(context: Any) -> dict[str, str]:
    pairs = context.invocation_metadata() or ()
    return {key: value for key, value in pairs if isinstance(value, str)}
