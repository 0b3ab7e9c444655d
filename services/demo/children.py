"""Both services as one child process (`recap serve all`) on free ports, stopped whatever happens."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_START_S = 60.0
_STOP_S = 10.0


class DemoError(ValueError):
    """The demo cannot run; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Endpoints:
    """Where the services of the demo listen."""

    policy_port: int
    critic_port: int

    @property
    def policy(self) -> str:
        return f"ws://127.0.0.1:{self.policy_port}/act"

    @property
    def critic(self) -> str:
        return f"http://127.0.0.1:{self.critic_port}"


@contextmanager
def serving(models: Path, *, beta: float, log: Path) -> Iterator[Endpoints]:
    """Start both services, wait until they answer, stop them at the end. Their output goes to `log`.

    Raises DemoError with the end of that output when they do not start.
    """
    endpoints = Endpoints(*_free_ports(2))
    command = [sys.executable, "-m", "recap_model.cli", "serve", "all", "--models", str(models), "--beta", str(beta)]
    command += ["--policy-port", str(endpoints.policy_port), "--critic-port", str(endpoints.critic_port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which then stops the child in order.
        child = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            _wait_ready(child, endpoints, log)
            yield endpoints
        finally:
            _stop(child)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def _wait_ready(child: "subprocess.Popen[bytes]", endpoints: Endpoints, log: Path) -> None:
    limit = time.monotonic() + _START_S
    waiting = [f"http://127.0.0.1:{port}/readyz" for port in (endpoints.critic_port, endpoints.policy_port)]
    while waiting:
        if child.poll() is not None:
            raise DemoError(f"the services ended with exit code {child.returncode} while starting: {_tail(log)}")
        if time.monotonic() > limit:
            raise DemoError(f"{waiting[0]} did not answer within {_START_S:.0f} s: {_tail(log)}")
        try:
            with urllib.request.urlopen(waiting[0], timeout=2):
                waiting.pop(0)
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)


def _tail(log: Path, lines: int = 4) -> str:
    text = " | ".join(line.strip() for line in log.read_text(errors="replace").splitlines()[-lines:] if line.strip())
    return f"{text or 'no output'} (all of it: {log})"


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """SIGTERM drains; a child that does not stop takes its whole process group with it."""
    child.terminate()
    try:
        child.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 9)
        child.wait()
