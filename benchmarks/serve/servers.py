"""Every server of the comparison as a process on a free port, with the robots that load it in another."""

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serve import standalone
from benchmarks.serve.payloads import Payload
from benchmarks.serve.processes import child, cpu_seconds, spent, stop

_SCRIPTS = Path(standalone.__path__[0])
_START_S = 300.0  # a busy machine takes minutes to import what some peers import
_GRACE_S = 60.0  # beyond the seconds that a job asks for; a request gives up after 10 s by itself


class Unmeasured(ValueError):
    """A server did not start, or did not answer as it should; the message says what it said."""


@dataclass(frozen=True)
class Server:
    """python: the interpreter of the server and of its robots. protocol: `openpi`, or the name of a peer."""

    name: str
    protocol: str
    python: Path
    models: Path | None = None

    def command(self, port: int, payload: Payload, file: Path, folder: Path) -> list[str]:
        if self.name.startswith("recap"):
            models = [] if self.models is None else ["--models", str(self.models)]
            return [str(self.python), "-m", "benchmarks.serve.ours", str(port), payload.name, *models]
        return [str(self.python), str(_SCRIPTS / f"serve_{self.name}.py"), str(port), str(file), str(folder)]

    def cannot(self, payload: Payload) -> str | None:
        """Why this payload is none for it."""
        return "its protocol carries raw frames only" if payload.jpeg and self.name == "lerobot" else None


@dataclass(frozen=True)
class Block:
    """One robot, asking again as soon as it is answered. cpu_s: of the server, a request."""

    latencies_ms: list[float]
    cpu_s: float


@dataclass(frozen=True)
class Probe:
    """Robots on a clock. missed: of `asked` deadlines; lag_ms: of the load's own timers."""

    latencies_ms: list[float]
    cpu_s: float
    asked: int
    missed: int
    lag_ms: float


class Served:
    """A started server and its load."""

    def __init__(self, pid: int, load: "_Load", file: Path) -> None:
        self._pid, self._load, self._file = pid, load, file

    def closed(self, requests: int, warm_up: int, seconds: float) -> Block:
        job = {"mode": "closed", "requests": requests, "warm_up": warm_up, "seconds": seconds}
        answer, cpu = self._measured(job, seconds)
        return Block(answer["latencies_ms"], cpu / answer["asked"])

    def open_loop(self, robots: int, hz: int, seconds: float) -> Probe:
        job = {"mode": "open", "robots": robots, "hz": hz, "seconds": seconds}
        answer, cpu = self._measured(job, seconds)
        times = answer["latencies_ms"]
        return Probe(times, cpu / max(len(times), 1), answer["asked"], answer["missed"], answer["lag_ms"])

    def _measured(self, job: dict[str, Any], seconds: float) -> tuple[dict[str, Any], float]:
        before = cpu_seconds(self._pid)
        answer = self._load.run({**job, "payload": str(self._file)}, seconds + _GRACE_S)
        return answer, spent(before, cpu_seconds(self._pid))


@contextmanager
def serving(server: Server, payload: Payload, file: Path, folder: Path) -> Iterator[Served]:
    """Start `server` for a payload, wait until it answers, stop it and all its children at the end.

    file: the payload on disk; folder: for logs and whatever the server writes. Raises Unmeasured.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = folder / "server.log"
    environment = _environment(server)
    with child(server.command(port, payload, file, folder), log, environment, folder) as process:
        _wait_port(process, port, log)
        robots = [str(server.python), str(_SCRIPTS / "robots.py"), server.protocol, str(port), str(folder)]
        with _Load.started(robots, folder, environment) as load:
            try:
                load.run({"mode": "ready", "patience_s": _START_S, "payload": str(file)}, _START_S + _GRACE_S)
            except Unmeasured as error:
                raise Unmeasured(f"{error}; its log ends with: {_tail(log)}") from error
            yield Served(process.pid, load, file)


class _Load:
    """`robots.py` in a process: a job in, an answer out."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process, self._log = process, log

    @classmethod
    @contextmanager
    def started(cls, command: list[str], folder: Path, environment: Mapping[str, str]) -> Iterator["_Load"]:
        log = folder / "robots.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                start_new_session=True,
                cwd=folder,
                env=dict(environment),
            )
        try:
            yield cls(process, log)
        finally:
            stop(process)

    def run(self, job: dict[str, Any], patience_s: float) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(job).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise Unmeasured(f"its robots ended: {_tail(self._log)}") from error
        if not select.select([stdout], [], [], patience_s)[0]:
            raise Unmeasured(f"no answer from its robots within {patience_s:.0f} s")
        line = stdout.readline()
        if not line:
            raise Unmeasured(f"its robots ended: {_tail(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unmeasured(answer["error"])
        return answer


def _environment(server: Server) -> dict[str, str]:
    """Nothing of ours in a peer's interpreter, and no peer that calls home."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    if server.python != Path(sys.executable):
        kept.pop("PYTHONPATH", None)
    quiet = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "WANDB_MODE": "disabled"}
    patient = {"RAY_agent_register_timeout_ms": f"{1000 * _START_S:.0f}"}  # its start fails on a busy machine otherwise
    return kept | quiet | patient


def _wait_port(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    limit = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
        if process.poll() is not None:
            raise Unmeasured(f"ended with {process.returncode} while starting: {_tail(log)}")
        if time.monotonic() > limit:
            raise Unmeasured(f"did not listen within {_START_S:.0f} s: {_tail(log)}")


def _tail(log: Path, lines: int = 3) -> str:
    text = " | ".join(line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip())
    return " | ".join(text.split(" | ")[-lines:])[-400:] or "no output"
