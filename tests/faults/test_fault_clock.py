"""The wall clock jumps, as when a robot gets its time from the network: nothing that moves a robot may notice."""

import ast
import time
from pathlib import Path

import pytest

from fault_world import Outage, drive, marked_service

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("clients/recap_client", "services/common", "services/policy", "services/critic")
WALL = {("time", "time"), ("time", "time_ns"), ("time", "localtime"), ("time", "gmtime"), ("datetime", "now"),
        ("datetime", "utcnow"), ("datetime", "today")}  # fmt: skip
LABELS = {
    "clients/recap_client/rollout_file.py": "stamps of log messages, for viewers",
    "services/common/audit_log.py": "when a model was changed",
    "services/common/auth.py": "whether a key has expired, which is a date",
    "services/common/keys.py": "when a key was made",
    "services/common/spans.py": "times of spans, for viewers",
    "services/policy/recording_files.py": "names of files",
}
"""Files that may read the wall clock, and what for: dates for people, nothing that a robot's next action hangs on."""


def wall_clock_reads(source: str) -> list[int]:
    """Lines that read the wall clock, also under another name."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            lines += [node.lineno for name in node.names if ("time", name.name) in WALL]
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            lines += [node.lineno] * ((owner, node.attr) in WALL)
    return lines


def test_only_labels_read_the_wall_clock() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (lines := wall_clock_reads(path.read_text()))
    }
    assert set(found) <= set(LABELS), f"decide by time.monotonic(): {found}"


@pytest.mark.parametrize("source", ["time.time()", "from time import time", "x = time.time_ns",
                                    "datetime.datetime.now()", "datetime.now(UTC)"])  # fmt: skip
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert wall_clock_reads(source)
    assert not wall_clock_reads("time.monotonic()\ntime.perf_counter()\nself.time()")


@pytest.mark.parametrize("jump", [3600.0, -86400.0])
def test_a_robot_does_not_notice(jump: float, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Robot and service run in this process, so both get the other time in mid-episode."""
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    monkeypatch.setattr(time, "time_ns", lambda: int((real() + offset[0]) * 1e9))

    def set_clock(seconds: float) -> None:
        offset[0] = seconds

    with marked_service(models) as service:
        outage = Outage(lambda: set_clock(jump), lambda: set_clock(0.0), held=0, steps=12)
        driven = drive(service.url(), outage, tmp_path / "e.mcap", deadline_s=10.0)
    assert driven.reconnects == 0
    assert (driven.rollout.t[1:] > driven.rollout.t[:-1]).all() and driven.rollout.t[-1] - driven.rollout.t[0] < 60
