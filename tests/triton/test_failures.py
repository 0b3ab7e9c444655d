"""Triton dies, hangs, or comes back as another one: robots are told within their deadlines, nothing is restarted."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.network_proxy import NetworkProxy
from engine_laws import batch
from recap_client.spec import RobotSpec
from repository_factory import build_repository
from service_harness import NativeClient, act, eventually, fetch
from services.common.engine import load_engine
from services.common.errors import ServiceError
from services.common.server import Running
from services.common.triton_engine import unload
from triton_server import Triton, policy_service, serve_by_triton, triton, triton_repository

DEADLINE_MS = 1000.0
LATE_MS = 500.0  # for the way of the answer, on a machine that may be busy
TYPED = {"unavailable", "deadline"}


@dataclass
class Robot:
    """Asks at 10 Hz and notes what came: (asked at, seconds it took, error code or "ok")."""

    url: str
    number: int
    log: list[tuple[float, float, str]] = field(default_factory=list)

    def live(self, stop: threading.Event) -> None:
        with NativeClient(self.url) as client:
            spec = _robot_spec(client)
            seq = 0
            while not stop.is_set():
                seq += 1
                message = act(spec, seq, robot=f"r{self.number}", deadline_ms=DEADLINE_MS)
                asked = time.monotonic()
                reply = client.ask(message)
                self.log.append((asked, time.monotonic() - asked, reply.get("code", "ok")))
                assert reply["seq"] == seq
                stop.wait(0.1)

    def answers(self, since: float, until: float = np.inf) -> list[str]:
        return [code for asked, _, code in self.log if since <= asked < until]


def _robot_spec(client: NativeClient) -> Any:
    return RobotSpec.from_json(client.welcome["spec"]["robot"])


@contextmanager
def fleet(service: Running, count: int = 8) -> Iterator[list[Robot]]:
    stop = threading.Event()
    robots = [Robot(f"ws://127.0.0.1:{service.port}/act", number) for number in range(count)]
    threads = [threading.Thread(target=robot.live, args=(stop,)) for robot in robots]
    for thread in threads:
        thread.start()
    try:
        yield robots
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("way", ["grpc", "http", "grpc ?shm=off", "http ?shm=off"])
def test_killed_under_load_by_eight_robots(own_server: Triton, way: str) -> None:
    scheme, _, options = way.partition(" ")
    with policy_service(own_server.models, own_server.url(scheme, options)) as service, fleet(service) as robots:
        eventually(lambda: all(robot.answers(0.0)[-3:] == ["ok"] * 3 for robot in robots), 60.0)
        own_server.kill()
        dead = time.monotonic()
        eventually(lambda: all(len(robot.answers(dead)) >= 5 for robot in robots), 60.0)
        status, text = fetch(f"http://127.0.0.1:{service.port}/readyz")
        assert status == 503 and "the engine failed: policy 1 at" in text
        assert fetch(f"http://127.0.0.1:{service.port}/livez")[0] == 200
        own_server.start()
        back = time.monotonic()
        eventually(lambda: all("ok" in robot.answers(back) for robot in robots), 30.0)
        resumed = [min(asked + took for asked, took, code in r.log if asked >= back and code == "ok") for r in robots]
        eventually(lambda: all(robot.answers(back)[-5:] == ["ok"] * 5 for robot in robots), 30.0)
    for robot in robots:
        assert all(1000 * took <= DEADLINE_MS + LATE_MS for _, took, _ in robot.log)
        down = robot.answers(dead + 0.2, back - 2.0)  # the first moments may still hold an answer on its way
        assert set(robot.answers(0.0)) <= TYPED | {"ok"} and set(down) <= TYPED and robot.answers(dead)
    assert max(resumed) - back <= 5.0


def through(proxy: NetworkProxy, scheme: str, options: str) -> str:
    return f"{scheme}://127.0.0.1:{proxy.port}{options}"


def port(server: Triton, scheme: str) -> int:
    return server.http if scheme == "http" else server.grpc


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_connection_that_carries_nothing_costs_no_more_than_the_deadline(
    models: Path, server: Triton, scheme: str
) -> None:
    with (
        NetworkProxy(port(server, scheme)) as proxy,
        policy_service(models, through(proxy, scheme, "?timeout=2")) as service,
        fleet(service, 4) as robots,
    ):
        eventually(lambda: all("ok" in robot.answers(0.0) for robot in robots), 60.0)
        proxy.delay_s = 300.0
        silent = time.monotonic()
        eventually(lambda: all(len(robot.answers(silent)) >= 3 for robot in robots), 60.0)
        proxy.delay_s = 0.0
        back = time.monotonic()
        eventually(lambda: all("ok" in robot.answers(back) for robot in robots), 30.0)
    for robot in robots:
        assert "deadline" in robot.answers(silent, back) and set(robot.answers(0.0)) <= TYPED | {"ok"}
        assert all(1000 * took <= DEADLINE_MS + LATE_MS for _, took, _ in robot.log)


@pytest.mark.parametrize("way", ["grpc", "http", "grpc &shm=off", "http &shm=off"])
def test_a_silent_connection_and_no_deadline(models: Path, server: Triton, way: str) -> None:
    """The address's own limit holds; the next requests go over another connection, and into another slot than the one
    that Triton may still write to."""
    scheme, _, options = way.partition(" ")
    with NetworkProxy(port(server, scheme)) as proxy:
        engine = load_engine(models, "policy", f"triton@{through(proxy, scheme, '?timeout=0.5' + options)}")
        inputs = batch(engine, 1)
        right = engine.run(inputs)["actions"]
        proxy.freeze()
        with pytest.raises(ServiceError, match=r"policy 1 at .*: no answer within 0.\d+ s; it is asked again") as error:
            engine.run(inputs)
        assert error.value.fault.code == "unavailable" and error.value.fault.retry_after_s == 1.0
        np.testing.assert_array_equal(eventually(lambda: _run(engine, inputs), 30.0)["actions"], right)
        engine.close()


@pytest.mark.parametrize("way", ["grpc", "http", "grpc ?shm=off", "http ?shm=off"])
def test_another_model_after_a_restart_is_not_served(own_server: Triton, tmp_path: Path, way: str) -> None:
    """Even when nobody asked while Triton was away."""
    scheme, _, options = way.partition(" ")
    engine = load_engine(own_server.models, "policy", f"triton@{own_server.url(scheme, options)}")
    inputs = batch(engine, 2)
    right = engine.run(inputs)["actions"]
    mine = tmp_path / "mine"
    shutil.copytree(own_server.models, mine)
    own_server.kill()
    shutil.rmtree(own_server.models / "policy")
    build_repository(own_server.models, models=("policy",), nan_actions=True)
    serve_by_triton(own_server.models / "policy")
    own_server.start()
    time.sleep(1.0)  # gRPC tells of the lost connection from a thread of its own
    with pytest.raises(ServiceError, match=r"model of the model: expected [0-9a-f]{12}|parity of the model") as error:
        engine.run(inputs)
    assert error.value.fault.code == "unavailable"
    own_server.kill()
    shutil.rmtree(own_server.models)
    shutil.copytree(mine, own_server.models)
    own_server.start()
    np.testing.assert_array_equal(eventually(lambda: _run(engine, inputs), 30.0)["actions"], right)
    engine.close()


def _run(engine: Any, inputs: Any) -> Any:
    try:
        return engine.run(inputs)
    except ServiceError:
        return None


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_model_that_is_unloaded_meanwhile_is_unavailable(tmp_path: Path, scheme: str) -> None:
    models = triton_repository(tmp_path / "models", models=("policy",))
    with triton(models, "--model-control-mode=explicit") as server:
        engine = load_engine(models, "policy", f"triton@{server.url(scheme)}")  # which has it loaded
        inputs = batch(engine, 1)
        engine.run(inputs)
        unload(server.url(scheme), "policy")

        def unavailable() -> bool:
            try:
                engine.run(inputs)
            except ServiceError as error:
                return error.fault.code == "unavailable"
            return False

        eventually(unavailable, 30.0)
        engine.close()
