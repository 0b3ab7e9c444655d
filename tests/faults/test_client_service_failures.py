"""The robot side when the service is late, gone, wrong or lying: typed errors, held position, never a stale chunk."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from recap_client.cli import main
from recap_client.fleet import FleetError, FleetSettings, Job, jobs_for, run_fleet
from recap_client.policy import RemotePolicy
from recap_client.record import read_rollout
from recap_client.robots.base import Observation, RobotError
from recap_client.runtime import LoopSettings, run_episode
from recap_client.session import DeadlineExceeded, ProtocolError, ServiceRefused, ServiceUnavailable, Session
from recap_client.spec import RobotSpec, SpecError
from recap_client.value import RemoteCritic
from scripted_service import ScriptedService
from toy_robot import TOY_SPEC, ToyHuman, ToyRobot

TESTS = Path(__file__).resolve().parents[1]


def observation(x: float = 0.0) -> Observation:
    return Observation({"eye": np.zeros((8, 8, 3), np.uint8)}, np.array([x, 0], np.float32), time.monotonic())


def until(condition, seconds: float = 10.0) -> bool:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Relay:
    """Passes bytes on to a port here. greet: as an HTTP proxy, whose requests are in `asked`. While `silent`,
    everything is swallowed, in both directions and without closing anything."""

    def __init__(self, target: int, greet: bool = True) -> None:
        self.target, self.greet = target, greet
        self.asked: list[str] = []
        self.silent = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/act"

    def __enter__(self) -> "Relay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for link in self._sockets:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self._sockets += [near, far]
                if self.greet:
                    request = b""
                    while not request.endswith(b"\r\n\r\n"):
                        request += near.recv(4096)
                    self.asked.append(request.split(b"\r\n")[0].decode())
                    near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.silent.is_set():
                    sink.sendall(data)


def test_a_late_reply_is_never_paired_with_a_newer_observation() -> None:
    # each reply carries the state it answers, so a stale one would show
    echo = lambda m: np.full((8, 1), m["observation"]["state"][0], np.float32)  # noqa: E731
    with ScriptedService(TOY_SPEC, script=lambda n: "late:0.3" if n == 0 else "", act=echo) as service:
        policy = RemotePolicy(service.url, TOY_SPEC)
        with pytest.raises(DeadlineExceeded, match="within 50 ms"):
            policy.infer(observation(0.01), "go right", deadline_s=0.05)
        assert not policy.session.connected
        with pytest.raises(ServiceUnavailable, match="reconnecting"):
            policy.infer(observation(0.02), "go right")
        assert until(lambda: policy.session.connected)
        time.sleep(0.35)  # the late reply has been sent by now
        for x in (0.03, 0.04):
            np.testing.assert_allclose(policy.infer(observation(x), "go right").actions, x)
        assert policy.session.reconnects == 1
        assert [m["seq"] for m in service.of_type("act")] == [0, 2, 3], "seq 1 was refused before it was sent"
        policy.close()


@pytest.mark.parametrize("what,error", [
    ("drop", ServiceUnavailable), ("garbage", ProtocolError), ("text", ProtocolError), ("wrong_seq", ProtocolError),
])  # fmt: skip
def test_broken_replies_are_typed_and_the_session_recovers(what: str, error: type[Exception]) -> None:
    with ScriptedService(TOY_SPEC, script=lambda n: what if n == 0 else "") as service:
        policy = RemotePolicy(service.url, TOY_SPEC)
        with pytest.raises(error, match=r"127\.0\.0\.1"):
            policy.infer(observation(), "go right")
        assert until(lambda: policy.session.connected)
        assert policy.infer(observation(), "go right").actions.shape == (8, 1)
        policy.close()


def test_typed_errors_keep_the_connection_and_name_the_field() -> None:
    with ScriptedService(TOY_SPEC, script=lambda n: "error:bad_observation" if n == 0 else "shape") as service:
        policy = RemotePolicy(service.url, TOY_SPEC)
        with pytest.raises(ServiceRefused, match="state: expected 4 numbers, got 3") as caught:
            policy.infer(observation(), "go right")
        assert caught.value.code == "bad_observation" and policy.session.connected
        with pytest.raises(ProtocolError, match=r"actions: expected a float32 array \[H, 1\], got \[1\]"):
            policy.infer(observation(), "go right")
        policy.close()


def test_wrong_services_are_refused_at_the_door() -> None:
    with ScriptedService(TOY_SPEC, kind="critic") as service:
        with pytest.raises(ProtocolError, match="expected a policy service, got a critic service"):
            RemotePolicy(service.url, TOY_SPEC)
        critic = RemoteCritic(service.url, TOY_SPEC)
        assert critic.observe(observation(), "go right").progress == 0.5
        critic.close()
    other = RobotSpec("toy", TOY_SPEC.cameras, TOY_SPEC.state, TOY_SPEC.action, 10.0)
    different = r"control_hz differs: expected 50\.0, got 10\.0"
    with ScriptedService(other) as service, pytest.raises(SpecError, match=different):
        RemotePolicy(service.url, TOY_SPEC)
    with pytest.raises(ServiceUnavailable, match="is the policy service running there"):
        RemotePolicy(f"ws://127.0.0.1:{free_port()}/act", TOY_SPEC)


@pytest.mark.parametrize("wanted", ["none", "argument", "RECAP_PROXY"])
def test_only_a_proxy_that_is_asked_for_is_used(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    with ScriptedService(TOY_SPEC) as service, Relay(service.port) as ambient, Relay(service.port) as ours:
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{ambient.port}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        address = f"http://127.0.0.1:{ours.port}"
        if wanted == "RECAP_PROXY":
            monkeypatch.setenv("RECAP_PROXY", address)
        session = Session(service.url, "policy", TOY_SPEC, proxy=address if wanted == "argument" else None)
        assert session.call({"type": "ping", "t": 1.0})["t"] == 1.0
        session.close()
    assert ambient.asked == []
    assert ours.asked == ([] if wanted == "none" else [f"CONNECT 127.0.0.1:{service.port} HTTP/1.1"])


def test_every_caller_takes_the_proxy_of_its_own_arguments() -> None:
    """As an argument and not in the environment, where it would be that of every connection of the process."""
    before = dict(os.environ)
    with ScriptedService(TOY_SPEC) as service, Relay(service.port) as way:
        address = f"http://127.0.0.1:{way.port}"
        run_fleet([Job("right", 0)], FleetSettings("toy_robot:ToyRobot", {}, service.url, proxy=address))
        assert main(["spec", "--url", service.url, "--proxy", address]) == 0
        assert main(["bench", "--url", service.url, "--requests", "1", "--proxy", address]) == 0
        assert way.asked == [f"CONNECT 127.0.0.1:{service.port} HTTP/1.1"] * 4
    with ScriptedService(TOY_SPEC, "critic") as judge, Relay(judge.port) as way:
        RemoteCritic(judge.url, TOY_SPEC, proxy=f"http://127.0.0.1:{way.port}").session.close()
        assert way.asked == [f"CONNECT 127.0.0.1:{judge.port} HTTP/1.1"]
    assert dict(os.environ) == before


def test_a_proxy_that_is_not_there_is_named() -> None:
    with (
        ScriptedService(TOY_SPEC) as service,
        pytest.raises(ServiceUnavailable, match="cannot connect"),
    ):
        Session(service.url, "policy", TOY_SPEC, proxy=f"http://127.0.0.1:{free_port()}")


def test_a_half_open_connection_is_noticed_between_calls_and_replaced() -> None:
    """The way is cut without a word: no FIN, no RST, and the robot sends nothing that could fail."""
    with ScriptedService(TOY_SPEC) as service, Relay(service.port, greet=False) as way:
        session = Session(way.url, "policy", TOY_SPEC, heartbeat_s=0.3, timeout_s=2.0)
        assert session.call({"type": "ping", "t": 1.0})["type"] == "pong"
        way.silent.set()
        assert until(lambda: not session.connected), "no call was made meanwhile"
        with pytest.raises(ServiceUnavailable, match="reconnecting"):
            session.call({"type": "ping", "t": 2.0})
        way.silent.clear()
        assert until(lambda: session.connected, 20)
        assert session.reconnects == 1 and session.call({"type": "ping", "t": 3.0})["t"] == 3.0
        session.close()


def test_an_idle_connection_that_breaks_is_replaced_before_the_next_call() -> None:
    with ScriptedService(TOY_SPEC) as service:
        session = Session(service.url, "policy", TOY_SPEC, heartbeat_s=0.1)
        service.connections[0].close_socket()
        assert until(lambda: session.reconnects == 1 and session.connected)
        assert session.call({"type": "ping", "t": 1.0})["t"] == 1.0
        session.close()


def test_the_heartbeat_leaves_a_slow_answer_alone_and_ends_with_the_session() -> None:
    def beating() -> int:
        return sum(thread.name == "heartbeat" for thread in threading.enumerate())

    before = beating()
    with ScriptedService(TOY_SPEC, script=lambda _: "late:1.0") as service:
        policy = RemotePolicy(service.url, TOY_SPEC)
        policy.session._heartbeat_s = 0.05
        assert policy.infer(observation(), "go right").actions.shape == (8, 1) and policy.session.reconnects == 0
        policy.session._heartbeat_s = 5.0
        policy.close()
    assert until(lambda: beating() <= before)


def test_clock_offset_is_measured_and_follows_the_replies() -> None:
    with ScriptedService(TOY_SPEC) as service:
        policy = RemotePolicy(service.url, TOY_SPEC)
        assert policy.session.clock.best is None
        assert policy.clock_offset() == pytest.approx(100.0, abs=0.5)
        best = policy.session.clock.best
        assert best is not None and best.offset_s == pytest.approx(100.0, abs=best.error_s + 1e-3)
        policy.close()


SERVER = """
import sys, time
import numpy as np
from scripted_service import ScriptedService
from toy_robot import TOY_SPEC
with ScriptedService(TOY_SPEC, act=lambda _: np.full((8, 1), 0.04, np.float32), port=int(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def start_server(port: int) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_service_killed_in_mid_episode(tmp_path: Path) -> None:
    """The robot holds position, reconnects when the service is back, finishes, and the log has every step."""
    port = free_port()
    servers = [start_server(port)]

    class Robot(ToyRobot):
        def observe(self) -> Observation:
            if len(self.log) == 6 and servers[0].poll() is None:
                os.kill(servers[0].pid, signal.SIGKILL)
                servers[0].wait()
            if self.log[-5:] == [None] * 5 and len(servers) == 1:
                servers.append(start_server(port))
            return super().observe()

    robot = Robot(limit=600, hz=10)
    try:
        policy = RemotePolicy(f"ws://127.0.0.1:{port}/act", TOY_SPEC)
        result = run_episode(robot, "right", 0, policy=policy, recording=tmp_path / "e.mcap",
                             settings=LoopSettings(realtime=True))  # fmt: skip
        policy.close()
    finally:
        for server in servers:
            server.kill()
            server.communicate()
    rollout = read_rollout(tmp_path / "e.mcap")
    assert result.success and policy.session.reconnects == 1
    assert result.starved >= 5 and robot.log[:12] == pytest.approx([0.04] * 12), "the reserve first, then it holds"
    assert rollout.complete and rollout.steps == result.steps == len(robot.log)
    held = np.array([action is None for action in robot.log])
    np.testing.assert_array_equal(rollout.action[held], 0.0)
    assert (rollout.chunk[held] == -1).all() and np.isnan(rollout.proposed[held]).all()


def test_a_stopped_critic_does_not_stop_the_robot() -> None:
    robot = ToyRobot()
    with ScriptedService(robot.spec) as service:
        with ScriptedService(robot.spec, "critic", script=lambda n: "drop" if n else "") as judge:
            policy, critic = RemotePolicy(service.url, robot.spec), RemoteCritic(judge.url, robot.spec)
            critic.session._backoff_s = (5.0, 5.0)
            result = run_episode(robot, "right", 0, policy=policy, critic=critic, settings=LoopSettings(realtime=False))
            critic.close()
        policy.close()
    assert result.success and result.steps == 10 and len(result.values) == 1 and result.starved == 0


def test_a_service_that_stops_reading_does_not_block_for_ever() -> None:
    spec = RobotSpec("big", tuple(c.__class__(c.name, 2048, 2048) for c in TOY_SPEC.cameras), TOY_SPEC.state,
                     TOY_SPEC.action, 50.0)  # fmt: skip
    with ScriptedService(spec, script=lambda _: "late:4") as service:
        policy = RemotePolicy(service.url, spec, timeout_s=0.5)
        big = Observation({"eye": np.zeros((2048, 2048, 3), np.uint8)}, np.zeros(2, np.float32), 0.0)
        for seconds in (0.5, 0.2):  # the service is busy with the first when the second comes
            assert until(lambda: policy.session.connected)
            with pytest.raises((DeadlineExceeded, ServiceUnavailable)):
                policy.infer(big, "go right", deadline_s=seconds)
        policy.close()


def test_fleet_repeats_an_episode_that_starved(tmp_path: Path) -> None:
    def script(n: int) -> str:  # the whole first attempt after its first chunk: its reserve cannot bridge that
        return "drop" if n and len(service.of_type("reset")) == 1 else ""

    with ScriptedService(TOY_SPEC, script=script) as service:
        settings = FleetSettings("toy_robot:ToyRobot", {}, service.url, record=tmp_path)
        results = run_fleet([Job("right", 0), Job("right", 1)], settings)
    assert [(r.success, r.starved, r.steps) for r in results] == [(True, 0, 10)] * 2
    assert [m["episode"] for m in service.of_type("reset")] == ["right-000000"] * 2 + ["right-000001"]


def test_fleet_gives_up_with_the_reason() -> None:
    with (
        ScriptedService(TOY_SPEC, script=lambda _: "error:internal") as service,
        pytest.raises(FleetError, match="right-000000: 3 attempts failed: no action for 40 of 40 control steps"),
    ):
        run_fleet([Job("right", 0)], FleetSettings("toy_robot:ToyRobot", {}, service.url))


def test_fleet_resumes_and_keeps_interrupted_episodes(tmp_path: Path) -> None:
    robot = ToyRobot(break_at=3)
    with pytest.raises(RuntimeError):
        run_episode(robot, "right", 1, teleoperator=ToyHuman, recording=tmp_path / "right-000001.mcap")
    with ScriptedService(TOY_SPEC) as service:
        settings = FleetSettings("toy_robot:ToyRobot", {}, service.url, record=tmp_path)
        seen: list[tuple[int, bool]] = []
        note = lambda r, resumed: seen.append((r.seed, resumed))  # noqa: E731
        first = run_fleet(jobs_for(["right"], 2, 0), settings, on_result=note)
        again = run_fleet(jobs_for(["right"], 3, 0), settings, on_result=note)
    assert seen == [(0, False), (1, False), (0, True), (1, True), (2, False)]
    assert [(r.seed, r.success, r.steps) for r in again[:2]] == [(r.seed, r.success, r.steps) for r in first]
    assert read_rollout(tmp_path / "right-000001.mcap.interrupted").steps == 3


def test_fleet_of_processes_keeps_order_and_tells_robots_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    with ScriptedService(TOY_SPEC) as service:
        settings = FleetSettings("toy_robot:ToyRobot", {}, service.url, record=tmp_path)
        results = run_fleet(jobs_for(["right"], 6, 10), settings, workers=2)
    assert [result.seed for result in results] == list(range(10, 16)) and all(result.success for result in results)
    assert {m["robot"] for m in service.of_type("act")} <= {"ToyRobot-0", "ToyRobot-1"}


def test_a_worker_that_dies_is_told_and_nothing_recorded_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    settings = FleetSettings("toy_robot:DyingRobot", {}, record=tmp_path)
    with pytest.raises(FleetError, match="a worker process died"):
        run_fleet(jobs_for(["right"], 4, 0), settings, workers=2)
    assert read_rollout(tmp_path / "right-000000.mcap").success


def test_a_fleet_without_a_service_or_robot_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    dead = FleetSettings("toy_robot:ToyRobot", {}, f"ws://127.0.0.1:{free_port()}/act")
    with pytest.raises(ServiceUnavailable, match="is the policy service running there"):
        run_fleet(jobs_for(["right"], 2, 0), dead, workers=2)
    with pytest.raises(RobotError, match="cannot import Nobody"):
        run_fleet(jobs_for(["right"], 2, 0), FleetSettings("toy_robot:Nobody"), workers=2)
