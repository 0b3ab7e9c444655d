"""What the figures were measured on, and whether it had anything else to do."""

import os
import platform
import time
from pathlib import Path

BUSY = 0.1
"""Share of all cores above which latencies say more about the neighbours than about the servers."""


def hardware() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{_cpu()}, {cores} cores, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"


def busy(seconds: float = 1.0) -> float:
    """Share of all cores that was in use, 0 to 1, while this process slept."""
    before = _ticks()
    time.sleep(seconds)
    idle, total = (after - earlier for after, earlier in zip(_ticks(), before, strict=True))
    return 1.0 - idle / total if total else 0.0


def _ticks() -> tuple[int, int]:
    """Idle (with waiting for disks) and all, since the machine started."""
    fields = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
