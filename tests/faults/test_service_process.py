"""`recap serve` as processes: ready, signals, taken ports, children that die."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from model_versions import add_version
from repository_factory import build_repository, robot_spec
from service_harness import NativeClient, act, eventually, fetch

SPEC = robot_spec()
COMMAND = "import sys; from services.cli import serve; sys.exit(serve(sys.argv[1:]))"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    def __init__(self, *arguments: object, log: Path) -> None:
        self.log = log
        with log.open("w") as stream:
            self.popen = subprocess.Popen([sys.executable, "-c", COMMAND, *map(str, arguments)], stderr=stream)

    def text(self) -> str:
        return self.log.read_text()

    def ready(self) -> None:
        eventually(lambda: "ready;" in self.text() or self.popen.poll() is not None, timeout=60)
        assert self.popen.poll() is None, self.text()


@contextmanager
def served(*arguments: object, log: Path) -> Iterator[Process]:
    process = Process(*arguments, log=log)
    try:
        yield process
    finally:
        process.popen.terminate()
        try:
            process.popen.wait(10)
        finally:
            process.popen.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_exit_code_is_zero(models: Path, tmp_path: Path, number: signal.Signals) -> None:
    port = free_port()
    with served("policy", "--models", models, "--policy-port", port, log=tmp_path / "log") as process:
        process.ready()
        with NativeClient(f"ws://127.0.0.1:{port}/act") as client:
            assert client.ask(act(SPEC))["type"] == "chunk"
            client.send(act(SPEC, 2))
            process.popen.send_signal(number)
            replies, code = client.until_closed()
            assert ([(reply["type"], reply["seq"]) for reply in replies], code) == ([("chunk", 2)], 1001)
        assert process.popen.wait(10) == 0, process.text()


def test_both_services_run_beside_each_other_and_a_dead_one_is_restarted(models: Path, tmp_path: Path) -> None:
    policy_port, critic_port = free_port(), free_port()
    with served(
        "all",
        "--models",
        models,
        "--policy-port",
        policy_port,
        "--critic-port",
        critic_port,
        "--log-format",
        "json",
        log=tmp_path / "log",
    ) as process:
        process.ready()
        for url in (
            f"ws://127.0.0.1:{policy_port}/act",
            f"ws://127.0.0.1:{critic_port}/value",
            f"http://127.0.0.1:{critic_port}/",
        ):
            assert url in process.text()
        children = [c for c in psutil.Process(process.popen.pid).children() if "spawn_main" in " ".join(c.cmdline())]
        assert len(children) == 2
        with NativeClient(f"ws://127.0.0.1:{policy_port}/act") as client:
            client.ask(act(SPEC))
            critic = next(c for c in children if any(conn.laddr.port == critic_port for conn in c.net_connections()))
            critic.kill()
            assert client.ask(act(SPEC, 2))["type"] == "chunk", "the policy serves on"
            eventually(lambda: "restarting" in process.text())
            eventually(lambda: _alive(critic_port), timeout=30)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(10) == 0, process.text()
        assert not any(child.is_running() for child in children)


def _alive(port: int) -> bool:
    try:
        return fetch(f"http://127.0.0.1:{port}/livez")[0] == 200
    except OSError:
        return False


def test_a_killed_supervisor_leaves_no_orphans(models: Path, tmp_path: Path) -> None:
    with served(
        "all", "--models", models, "--policy-port", free_port(), "--critic-port", free_port(), log=tmp_path / "log"
    ) as process:
        process.ready()
        children = psutil.Process(process.popen.pid).children()
        assert len(children) >= 2
        os.kill(process.popen.pid, signal.SIGKILL)
        process.popen.wait(10)
        eventually(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children))


def test_a_taken_port_is_one_clear_line(models: Path) -> None:
    from services.cli import serve
    from services.common.server import PortInUse

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for arguments in (
            ["policy", "--policy-port", str(port)],
            ["critic", "--critic-port", str(port)],
            ["all", "--critic-port", str(port), "--policy-port", str(free_port())],
        ):
            with pytest.raises(PortInUse, match=re.escape(f"127.0.0.1:{port}: cannot listen here")) as error:
                serve([*arguments, "--models", str(models)])
            assert "\n" not in str(error.value)


def test_a_restart_serves_the_version_that_is_named(tmp_path: Path) -> None:
    from services.cli import serve
    from services.common.repository import RepositoryError

    models, port, audit = build_repository(tmp_path / "models", models=("policy",)), free_port(), tmp_path / "audit"
    add_version(models, 2)
    arguments = ["policy", "--models", models, "--policy-port", port, "--audit", audit]
    with served(*arguments, "--model-version", 1, log=tmp_path / "log") as process:
        process.ready()
        with NativeClient(f"ws://127.0.0.1:{port}/act") as client:
            assert client.welcome["model"]["version"] == "1"
    start = json.loads(audit.read_text())
    assert (start["what"], start["options"], start["to"]["live"]["version"]) == ("start", {"version": 1}, "1")
    with pytest.raises(RepositoryError, match=r"policy: expected a version folder 9, got \[1, 2\]$"):
        serve([*map(str, arguments), "--model-version", "9"])


def test_a_policy_and_a_critic_of_different_robots_are_refused(models: Path, tmp_path: Path) -> None:
    import shutil

    from recap_client.spec import SpecError
    from services.cli import serve

    build_repository(tmp_path, size=32, models=["critic"])
    shutil.copytree(models / "policy", tmp_path / "policy")
    with pytest.raises(SpecError, match="cameras"):
        serve(["all", "--models", str(tmp_path), "--policy-port", str(free_port()), "--critic-port", str(free_port())])
