"""What was served, kept for robots whose client cannot record: a bounded queue and a thread that writes it to files.

The control path hands over references and never waits. What cannot be kept (queue full, disk full, writer dead) is
counted and said once; no request fails for it.
"""

import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable

from recap_client.spec import RobotSpec
from services.common.logs import get_logger
from services.common.settings import Recording
from services.policy.recorded import Ended, Judged, Served
from services.policy.recording_files import EpisodeFiles

_FLUSH_S = 0.5
_STOP_S = 2.0

log = get_logger("record")


class RecordingError(ValueError):
    """Nothing can be recorded into a folder."""


class ServiceRecorder:
    """Records what `served`, `ended` and `judged` tell, from any thread, until `close`.

    count: called with "written", "dropped" (queue full), "no_space" or "failed" for every request.
    Raises RecordingError when the folder cannot be written.
    """

    def __init__(self, settings: Recording, spec: RobotSpec, count: Callable[[str], None] = lambda _: None) -> None:
        _check_folder(settings)
        self._limit, self._count = settings.queue_bytes, count
        self._waiting: deque[Served | Ended | Judged] = deque()
        self._bytes = 0
        self._wake = threading.Condition()
        self._closing = self._dead_said = self._full_said = False
        self._files = EpisodeFiles(settings, spec)
        self._thread = threading.Thread(target=self._work, name="service-recorder", daemon=True)
        self._thread.start()

    def served(self, item: Served) -> None:
        """Keep one request, whole or not at all. Returns at once and never raises."""
        if not self._thread.is_alive():
            self._count("failed")
            if not self._dead_said:
                log.error("the recorder's thread has died; nothing is recorded until the service is started again")
            self._dead_said = True
            return
        size = item.size
        with self._wake:
            full = self._bytes + size > self._limit
            if not full:
                self._bytes += size
                self._waiting.append(item)
                self._wake.notify()
        if full:
            self._count("dropped")
            if not self._full_said:
                log.warning("the disk is slower than the robots; requests go unrecorded", queue_bytes=self._limit)
        self._full_said = full

    def ended(self, item: Ended) -> None:
        self._tell(item)

    def judged(self, item: Judged) -> None:
        self._tell(item)

    def close(self) -> None:
        """Write what waits, end every file; within two seconds, or what is left stays readable as `.part`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(_STOP_S)

    def _tell(self, item: Ended | Judged) -> None:
        with self._wake:
            self._waiting.append(item)
            self._wake.notify()

    def _work(self) -> None:
        flushed = time.monotonic()
        while True:
            with self._wake:
                if not self._waiting and not self._closing:
                    self._wake.wait(_FLUSH_S)
                item = self._waiting.popleft() if self._waiting else None
                done = item is None and self._closing
            if done:
                break
            self._handle(item)
            if time.monotonic() - flushed >= _FLUSH_S:
                self._files.tick()
                flushed = time.monotonic()
        self._files.close()

    def _handle(self, item: Served | Ended | Judged | None) -> None:
        if isinstance(item, Served):
            self._count(self._files.served(item))
            with self._wake:
                self._bytes -= item.size
        elif isinstance(item, Ended):
            self._files.ended(item)
        elif isinstance(item, Judged):
            self._files.judged(item)


def _check_folder(settings: Recording) -> None:
    folder = settings.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = os.statvfs(folder)
    except OSError as error:
        raise RecordingError(
            f"{folder}: cannot record into this folder ({error.strerror}); make it writable for the service's account, "
            "or choose another with --record"
        ) from error
    there = free.f_bavail * free.f_frsize
    if there < settings.min_free:
        raise RecordingError(
            f"{folder}: expected at least {settings.min_free / 2**30:.2f} GiB free to record, got {there / 2**30:.2f}; "
            "make room, or lower --record-min-free"
        )
