"""Process trees: what they use, and that none is left behind. Linux (/proc)."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_STOP_S = 10.0


def tree(root: int) -> list[int]:
    """`root` and its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found = [root]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found


def cpu_seconds(root: int) -> dict[int, float]:
    """Process -> CPU seconds so far, of the whole tree, to the nanosecond."""
    used = {}
    for pid in tree(root):
        with contextlib.suppress(OSError):  # gone in the meantime
            used[pid] = time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3), which Python does not have
    return used


def spent(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """CPU seconds between two readings; what a process that ended in between had used is lost."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


@contextmanager
def child(
    command: list[str], log: Path, environment: Mapping[str, str], folder: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in `folder` whose whole tree ends with the block. Its standard input is a pipe that ends with this
    process, its output goes to `log`. In a session of its own, so that Ctrl-C reaches only this process, which then
    stops it."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env=dict(environment),
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]", patience_s: float = _STOP_S) -> None:
    """SIGTERM to the root, which ends its own children where it is well made; SIGKILL to what is left of its tree and
    of its process group (the children of a root that died before this)."""
    family = {pid: _started(pid) for pid in tree(process.pid)[1:]}
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    for pid, started in family.items():
        if started is not None and _started(pid) == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # closing flushes what the dead will not read
                pipe.close()


def _started(pid: int) -> str | None:
    """When it started: tells a process from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
