"""The audit log: what is on record stays there, through crashes and full disks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.common.audit_log import AuditError, AuditLog

WRITER = """
import sys
from pathlib import Path
from services.common.audit_log import AuditLog
log = AuditLog(Path(sys.argv[1]))
n = 0
while True:
    log.write("key-1", "load", number=n)
    print(n, file=sys.stdout, flush=True)
    n += 1
"""


def test_a_crash_keeps_every_line_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.write("key-0", "promote", number=-1)
    log.close()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    numbers = (int(line) for line in process.stdout if line.strip().isdigit())
    seen = next(number for number in numbers if number >= 20)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["number"] for line in lines[: seen + 2]] == list(range(-1, seen + 1))
    assert all(line["who"] == "key-1" and line["time"] for line in lines[1:])


def test_a_torn_last_line_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"what": "load"}\n{"what": "pro')
    log = AuditLog(path)
    log.write("key-1", "rollback")
    log.close()
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"what": "load"}', '{"what": "pro'] and json.loads(lines[2])["what"] == "rollback"


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=r"cannot write the audit log \(Is a directory\); choose another file"):
        AuditLog(tmp_path)
    log = AuditLog(Path("/dev/full"))
    with pytest.raises(AuditError, match=r"cannot write the audit log \(No space left on device\)"):
        log.write("key-1", "load")
    log.close()


def test_without_a_file_events_are_only_logged() -> None:
    AuditLog(None).write("key-1", "load")


def test_the_file_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit.jsonl").close()
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o077 == 0
