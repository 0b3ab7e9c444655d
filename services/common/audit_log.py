"""Who changed what, when: JSON lines, appended and made durable one by one, and never rewritten."""

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from services.common.logs import get_logger

log = get_logger("audit")


class AuditError(ValueError):
    """The audit log cannot be written."""


class AuditLog:
    """Appends to `path`, each line durable when `write` returns; None = the service's log only.

    A line that a crash cut off stays as it is, and the next one begins on a line of its own. Raises AuditError when the
    file cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._lock, self._file = path, threading.Lock(), -1
        if path is None:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                os.write(self._file, b"\n")
        except OSError as error:
            self.close()
            raise AuditError(f"{path}: cannot write the audit log ({error.strerror}); choose another file") from error

    def write(self, who: str, what: str, **details: Any) -> None:
        """One event, from any thread. who: a key's id or an address. Raises AuditError; then it is not on record."""
        event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "who": who, "what": what, **details}
        log.info(f"model {what}", **{key: value for key, value in event.items() if key not in ("what", "time")})
        if self._path is None:
            return
        line = (json.dumps(event) + "\n").encode()
        with self._lock:
            try:
                if os.write(self._file, line) != len(line):  # a regular file takes less only when the disk is full
                    raise OSError(0, "the disk is full")
                os.fsync(self._file)
            except OSError as error:
                raise AuditError(f"{self._path}: cannot write the audit log ({error.strerror})") from error

    def close(self) -> None:
        """May be called twice."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
