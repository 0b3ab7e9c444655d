"""Child processes of the loop: `recap` commands with a log file, stopped politely and never left behind."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from training.experiment.stages import Serve

PROGRAM = (sys.executable, "-m", "recap_model.cli")
_READY_S = 120.0
_WIDE = {"COLUMNS": "140"}  # tables in a log file need not fit a terminal
_STOP_S = 20.0


class StageError(ValueError):
    """A command failed; the message holds the end of its log and how to run it by hand."""


def run(
    command: Sequence[str],
    folder: Path,
    log: Path,
    *,
    program: Sequence[str] = PROGRAM,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Run one `recap` command in `folder` until it ends, its output appended to `log`. `tick` is called a few times a
    second. Raises StageError when it fails; on any exception here, Ctrl-C included, the child is stopped first."""
    with _child(command, folder, log, program) as process:
        while process.poll() is None:
            tick()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.25)
        if process.returncode:
            raise StageError(_failure(command, folder, log, process.returncode))


@contextmanager
def services(serve: Serve, folder: Path, log: Path, *, program: Sequence[str] = PROGRAM) -> Iterator[dict[str, str]]:
    """Services on free ports for the length of a block; yields the URLs by placeholder name."""
    policy, critic = free_ports(2)
    command = ["serve", "all" if serve.critic else "policy", "--models", serve.models, "--policy-port", str(policy),
               "--beta", f"{serve.beta:g}"]  # fmt: skip
    if serve.critic:
        command += ["--critic-port", str(critic)]
    with _child(command, folder, log, program) as process:
        for port in (policy, critic)[: 2 if serve.critic else 1]:
            _wait_ready(process, port, command, folder, log)
        yield {"policy_url": f"ws://127.0.0.1:{policy}/act", "value_url": f"ws://127.0.0.1:{critic}/value"}
        if process.poll() is not None:
            raise StageError(_failure(command, folder, log, process.returncode))


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]


@contextmanager
def _child(
    command: Sequence[str], folder: Path, log: Path, program: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        stream.write(f"$ recap {' '.join(command)}\n".encode())
        stream.flush()
        # a group of its own: Ctrl-C reaches the loop alone, which then stops its children in order
        process = subprocess.Popen([*program, *command], cwd=folder, stdin=subprocess.DEVNULL, stdout=stream,
                                   stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | _WIDE,
                                   preexec_fn=_end_with_parent)  # fmt: skip
        try:
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask (SIGINT, then SIGTERM), then insist; returns when the whole group has been told to end."""
    for number, patience in ((signal.SIGINT, _STOP_S), (signal.SIGTERM, _STOP_S / 2), (signal.SIGKILL, None)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # workers that outlived the command


def _end_with_parent() -> None:
    """In the child, before it starts: ask Linux for SIGTERM when the loop is killed, so that no training runs on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait_ready(process: subprocess.Popen[bytes], port: int, command: Sequence[str], folder: Path, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StageError(_failure(command, folder, log, process.returncode))
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise StageError(f"recap {' '.join(command)}: expected http://127.0.0.1:{port}/readyz to say ready within "
                     f"{_READY_S:.0f} s, got no such answer; its log is {log}")  # fmt: skip


def _failure(command: Sequence[str], folder: Path, log: Path, code: int) -> str:
    text = log.read_text(errors="replace").rpartition("\n$ recap ")[2].splitlines()
    tail = "\n".join(f"  | {line}" for line in text[-15:])
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return (f"`recap {' '.join(command)}` failed ({how}):\n{tail}\nby hand: cd {folder} && recap {' '.join(command)}\n"
            f"the whole log: {log}")  # fmt: skip
