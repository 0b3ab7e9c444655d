"""Hostile bytes and lost peers on the ports of the further fronts: nothing is executed, nothing hangs, the next robot
is served."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgpack
import psutil
import pytest

from groot_client import GrootClient
from lerobot_pickles import TimedObservation, lerobot_pickle
from repository_factory import CHUNK, TASKS, robot_spec
from service_harness import Served, eventually, observation, policy_server
from services.common.errors import ServiceError
from services.common.server import PortInUse
from services.common.settings import PolicySettings
from services.options import ServeArgs
from services.policy.fronts.callers import MOST, Callers
from services.policy.fronts.lerobot_messages import read_fields, write_bytes
from services.policy.pipeline import load_policy_engine
from services.policy.service import PolicyService
from services.supervise import serve_one

SPEC = robot_spec()
SEEN = observation(SPEC)
RAW = {
    **{dim.name: float(value) for dim, value in zip(SPEC.state, SEEN["state"], strict=True)},
    **SEEN["images"],
    "task": TASKS[0],
}
NEW = (("grpc.use_local_subchannel_pool", 1),)


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with policy_server(models, lerobot_port=0, groot_port=0) as server:
        yield server


class Robot:
    """`transport.AsyncInference` on bytes."""

    def __init__(self, served: Served | int) -> None:
        port = served if isinstance(served, int) else served.front("lerobot")
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", NEW)
        self.call: dict[str, Any] = {
            name: self.channel.unary_unary(f"/transport.AsyncInference/{name}")
            for name in ("Ready", "SendPolicyInstructions", "GetActions")
        }
        self.stream = self.channel.stream_unary("/transport.AsyncInference/SendObservations")

    def __enter__(self) -> "Robot":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def send(self, data: bytes) -> None:
        self.stream(iter([b"\x08\x03" + write_bytes(2, data)]), timeout=20)

    def works(self) -> bool:
        self.send(lerobot_pickle(TimedObservation(1.0, 0, RAW)))
        reply = read_fields(self.call["GetActions"](b"", timeout=20))[1]
        return bytes(reply).count(b"FloatStorage") == CHUNK  # type: ignore[arg-type]


def refused(call: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value


class _Bomb:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("function", [os.system, subprocess.getoutput, eval])
def test_a_pickle_that_would_run_something_runs_nothing(
    served: Served, tmp_path: Path, function: Any, protocol: int
) -> None:
    marker = tmp_path / "marker"
    text = f"open({str(marker)!r}, 'w')" if function is eval else f"touch {marker}"
    bomb = _Bomb(function, text)
    nested = TimedObservation(1.0, 0, {**RAW, "front": {"a": [bomb]}})
    with Robot(served) as robot:
        for data in (pickle.dumps(bomb, protocol), lerobot_pickle(nested, max(protocol, 3))):
            error = refused(lambda data=data: robot.send(data))
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "nothing of it was executed" in error.details()
            setup = write_bytes(1, data)
            error = refused(lambda setup=setup: robot.call["SendPolicyInstructions"](setup, timeout=20))
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert robot.works()
    assert not marker.exists()
    pickle.loads(pickle.dumps(bomb, protocol))
    assert eventually(marker.exists)  # the bomb was live


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + b"\xff" * 8 + b".",
        b"\x80\x04Nr\xff\xff\xff\x7f.",
        b"\x80\x04" + b"]\x94" * 9_000 + b"a" * 8_999 + b".",
        b"\x80\x04" + b"(" * 19_000 + b"t" * 900,
        b"\x80\x04]\x94" + b"(h\x00h\x00h\x00h\x00e" * 2_000 + b".",
        b"\x80\x04X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"\x94" + b"h\x00h\x00\x86\x94" * 4_000 + b".",
        b"\x80\x04" + b"\x8a\xff" + b"\xff" * 254 + b"\x7f.",
    ],
    ids=["length", "memo", "deep", "marks", "laughs", "text", "integer"],
)
def test_a_pickle_that_would_fill_the_memory_does_not(served: Served, data: bytes) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    with Robot(served) as robot:
        for _ in range(3):
            assert refused(lambda: robot.send(data)).code() == grpc.StatusCode.INVALID_ARGUMENT
        assert robot.works()
    assert process.memory_info().rss - before < 100 << 20


def test_an_endless_transfer_is_cut_off(served: Served) -> None:
    piece, sent = b"\x08\x02" + write_bytes(2, bytes(1 << 20)), []

    def pieces() -> Iterator[bytes]:
        while len(sent) < 200:
            sent.append(1)
            yield piece

    with Robot(served) as robot:
        error = refused(lambda: robot.stream(pieces(), timeout=20))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "too_large" in error.details()
        assert robot.works()
    assert len(sent) < 200


@pytest.mark.parametrize(
    "messages", [[], [b"\x08\x01"], [b"\x08\x00"], [b"\x08\x09"], [b"\xff"], [b"\x12\xff\x01"], [b"\x08\x03\x10\x05"]]
)
def test_a_broken_transfer_is_a_status(served: Served, messages: list[bytes]) -> None:
    with Robot(served) as robot:
        assert refused(lambda: robot.stream(iter(messages), timeout=20)).code() == grpc.StatusCode.INVALID_ARGUMENT
        assert robot.works()


def test_a_second_transfer_beside_one_that_hangs_is_refused(served: Served) -> None:
    begun, over = threading.Event(), threading.Event()

    def pieces() -> Iterator[bytes]:
        yield b"\x08\x01" + write_bytes(2, b"a")
        begun.set()
        over.wait(20)

    with Robot(served) as robot:
        hanging = robot.stream.future(pieces())
        assert begun.wait(20)
        good = lerobot_pickle(TimedObservation(1.0, 0, RAW))
        assert eventually(lambda: _code(lambda: robot.send(good)) == grpc.StatusCode.UNAVAILABLE)
        hanging.cancel()
        over.set()
        assert eventually(lambda: _code(lambda: robot.send(good)) is None)


def _code(call: Callable[[], Any]) -> Any:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return None


@pytest.mark.parametrize("front", ["lerobot", "groot"])
@pytest.mark.parametrize("data", [b"", b"\0" * 64, b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 64])
def test_bytes_of_no_protocol_leave_the_others_in_peace(served: Served, front: str, data: bytes) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", served.front(front)), timeout=20) as raw:
            raw.sendall(data)
    with Robot(served) as robot, GrootClient(served.front("groot")) as other:
        assert robot.works() and other.call("ping")["status"] == "ok"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff" * 500,
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 5_000,
        b"\x81\xa4data" * 300 + b"\xc0",
        msgpack.packb([1]),
        pickle.dumps({"endpoint": "ping"}),
        msgpack.packb({"data": {"observation": {"video": 3, "state": {"x": None}, "language": {}}}}),
    ],
    ids=["empty", "code", "arrays", "map", "deep", "maps", "list", "pickle", "parts"],
)
def test_hostile_msgpack_is_an_error_of_groots_form(served: Served, data: bytes) -> None:
    with GrootClient(served.front("groot")) as client:
        assert msgpack.unpackb(client.raw(data))["error"].startswith("bad_")
        assert client.call("ping")["status"] == "ok"


def test_a_frame_beyond_the_limit_costs_the_connection_only(served: Served) -> None:
    limits = served.service.limits
    with GrootClient(served.front("groot")) as client, GrootClient(served.front("groot")) as other:
        assert "too_large" in msgpack.unpackb(client.raw(bytes(limits.message + 1)))["error"]
        client.socket.send(bytes(limits.frame + 1))
        assert other.call("ping")["status"] == "ok"


def test_recap_serve_opens_both_ports_and_a_signal_drains_them(models: Path, tmp_path: Path) -> None:
    ports = [_free_port() for _ in range(3)]
    options = [f"--{name}-port={port}" for name, port in zip(("policy", "lerobot", "groot"), ports, strict=True)]
    command = "import sys; from services.cli import serve; sys.exit(serve(sys.argv[1:]))"
    log = tmp_path / "log"
    with log.open("w") as stream:
        service = subprocess.Popen(
            [sys.executable, "-c", command, "policy", "--models", str(models), *options], stderr=stream
        )
    try:
        eventually(lambda: "ready;" in log.read_text() or service.poll() is not None, timeout=90)
        assert f"127.0.0.1:{ports[1]}" in log.read_text() and f"tcp://127.0.0.1:{ports[2]}" in log.read_text()
        with Robot(ports[1]) as robot, GrootClient(ports[2]) as other:
            assert robot.works() and other.call("ping")["status"] == "ok"
            waiting = robot.call["GetActions"].future(b"", timeout=20)
            service.send_signal(signal.SIGTERM)
            assert _code(waiting.result) in (None, grpc.StatusCode.UNAVAILABLE)
        assert service.wait(20) == 0, log.read_text()
    finally:
        service.kill()


@pytest.mark.parametrize("front", ["lerobot", "groot"])
def test_a_taken_port_is_said_before_a_model_is_loaded(tmp_path: Path, front: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        args = ServeArgs("policy", tmp_path / "none", policy_port=0, **{f"{front}_port": port})
        with pytest.raises(PortInUse, match=f"127.0.0.1:{port}: cannot listen here"):
            serve_one(args)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_robots_that_come_and_go_leave_no_session_behind(models: Path) -> None:
    service = PolicyService(load_policy_engine(models, 1.0, "onnxruntime"), PolicySettings())
    sessions = service.metrics.sessions
    try:
        callers = Callers(service, "x", lambda session: [session], busy=lambda state: len(state) > 1, idle_s=0.0)
        caller = service.gate.admit({}, "peer", "act")
        first = callers.of("a", caller)
        first.append(first[0])  # busy
        for number in range(MOST + 5):
            callers.of(number, caller)
        assert callers.of("a", caller) is first and len(callers) <= MOST
        first.pop()
        callers.forget_idle()
        assert len(callers) == 0 and sessions.collect()[0].samples[0].value == 0
        full = Callers(service, "x", lambda session: session)
        names = {full.of(number, caller).robot for number in range(MOST)}
        assert len(names) == MOST
        with pytest.raises(ServiceError, match="no room for another"):
            full.of("one more", caller)
        full.close()
        assert sessions.collect()[0].samples[0].value == 0
    finally:
        service.stop()
