"""The files of a service's recording: one rollout log an episode, in the schema of `recap_client.record`.

A step of such a log is a request. What a service cannot know is left open: the executed action is null, and `/episode`
says `"source": "service"`. Beyond the robot's own log a step holds the whole chunk (`actions`), the noise's `seed` and
`seq`, `prompt`, `model`, `timing` and `previous` (real-time chunking), so that the request can be sent again.
"""

import re
import shutil
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from recap_client.images import JpegImage, encode_jpeg, encode_png
from recap_client.rollout_file import RolloutFile, numbers
from recap_client.spec import RobotSpec
from services.common.logs import get_logger
from services.common.settings import Recording
from services.policy.chaining import Previous
from services.policy.recorded import Ended, Judged, Served

_LOOK_S = 1.0  # between two looks at the free space
_RETRY_S = 10.0  # after a failed write
_REMEMBERED = 64  # steps whose value may still come

log = get_logger("record")


@dataclass
class _Open:
    file: RolloutFile
    robot: str
    episode: str
    heard: float
    steps: int = 0
    lost: int = 0
    numbers: dict[int, int] = field(default_factory=dict)
    """number of the newest requests -> step."""


class EpisodeFiles:
    """Used by one thread. Nothing raises: a request is "written", "no_space" or "failed"."""

    def __init__(self, settings: Recording, spec: RobotSpec) -> None:
        self._settings, self._spec = settings, spec
        self._open: dict[Hashable, _Open] = {}
        self._numbers = count()
        self._looked, self._room, self._retry_at, self._said = -1e9, True, 0.0, ""

    def served(self, item: Served) -> str:
        """Write one request."""
        now = time.monotonic()
        entry = self._open.get(item.key)
        if entry is not None and (entry.robot, entry.episode) != (item.robot, item.episode):
            self._end(item.key, None, "next_episode")
            entry = None
        if not self._has_room(now) or now < self._retry_at:
            if entry is not None:
                entry.lost += 1
            return "failed" if self._room else "no_space"
        try:
            if entry is None:
                entry = self._open[item.key] = self._begin(item, now)
            entry.heard = now
            self._write(entry, item)
        except Exception as error:  # also a frame that cannot be encoded
            self._failed(item.key, error)
            return "failed"
        entry.numbers[item.number] = entry.steps
        if len(entry.numbers) > _REMEMBERED:
            del entry.numbers[next(iter(entry.numbers))]
        entry.steps += 1
        return "written"

    def ended(self, item: Ended) -> None:
        """Close the file of a session's episode, if it has one."""
        self._end(item.key, item.success, item.reason)

    def judged(self, item: Judged) -> None:
        """Add a value to the step that it judges."""
        for key, entry in list(self._open.items()):
            step = entry.numbers.pop(item.number, None)
            if step is not None:
                message = {"step": step, "value": item.value}
                self._attempt(key, partial(entry.file.add, "/value", time.monotonic(), message, step))

    def tick(self) -> None:
        """Flush every file, and end the episodes that have gone silent."""
        limit = time.monotonic() - self._settings.gap_s
        for key, entry in list(self._open.items()):
            if entry.heard < limit:
                self._end(key, None, "silent")
            else:
                self._attempt(key, entry.file.flush)

    def close(self) -> None:
        """End every file."""
        for key in list(self._open):
            self._end(key, None, "shutdown")

    def _begin(self, item: Served, now: float) -> _Open:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        name = f"{stamp}-{next(self._numbers):06d}-{_plain(item.robot)}-{_plain(item.episode)}.mcap"
        file = RolloutFile(self._settings.folder / stamp[:8] / name, self._spec.camera_names, library="recap-service")
        entry = _Open(file, item.robot, item.episode, now)
        file.add("/episode", item.t, {
            "spec": self._spec.to_json(), "robot": item.robot, "task": item.prompt, "task_name": item.prompt,
            "seed": -1, "episode": item.episode, "policy": dict(item.model), "demonstration": False, "style": None,
            "control_hz": self._spec.control_hz, "clock_offset_s": None, "source": "service", "dialect": item.dialect,
        })  # fmt: skip
        return entry

    def _write(self, entry: _Open, item: Served) -> None:
        step, t = entry.steps, item.t
        lossy = False
        for camera in self._spec.camera_names:
            data, form, changed = self._encoded(item.images[camera])
            lossy |= changed
            entry.file.add_image(camera, t, data, form, step)
        # after its images: a step that can be read has all of them
        entry.file.add("/step", t, {
            "step": step, "t": t if item.t_obs is None else item.t_obs, "state": numbers(item.state),
            "action": [None] * len(self._spec.action), "proposed": numbers(item.actions[0]), "chunk": step,
            "intervention": False, "value": None, "actions": [numbers(row) for row in item.actions],
            "seq": item.seq, "seed": item.seed, "prompt": item.prompt, "model": dict(item.model),
            "timing": dict(item.timing), "lossy": lossy, "previous": _plain_previous(item.previous),
        }, step)  # fmt: skip

    def _encoded(self, frame: Any) -> tuple[bytes, str, bool]:
        """File, format, and whether it differs from what came."""
        if isinstance(frame, JpegImage):
            return frame.data, "jpeg", False
        if self._settings.images == "png":
            return encode_png(np.asarray(frame)), "png", False
        return encode_jpeg(np.asarray(frame)), "jpeg", True

    def _end(self, key: Hashable, success: bool | None, reason: str) -> None:
        entry = self._open.get(key)
        if entry is not None:
            self._attempt(key, partial(self._finish, entry, success, reason))
            self._open.pop(key, None)

    def _finish(self, entry: _Open, success: bool | None, reason: str) -> None:
        entry.file.add("/outcome", time.monotonic(), {
            "success": success, "steps": entry.steps, "reason": reason, "missed_deadlines": 0, "dropped": entry.lost,
        })  # fmt: skip
        entry.file.finish()

    def _attempt(self, key: Hashable, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._failed(key, error)

    def _failed(self, key: Hashable, error: Exception) -> None:
        """Give the episode's file up as it is, and try again with a new one after a while."""
        self._retry_at = time.monotonic() + _RETRY_S
        entry = self._open.pop(key, None)
        log.error("recording failed; what was written stays readable", error=f"{type(error).__name__}: {error}",
                  file=None if entry is None else str(entry.file.part), retry_s=_RETRY_S)  # fmt: skip
        if entry is not None:
            try:
                entry.file.abandon()
            except OSError:
                log.warning("the end of the file is lost", file=str(entry.file.part))

    def _has_room(self, now: float) -> bool:
        if now - self._looked >= _LOOK_S:
            self._looked = now
            try:
                free = shutil.disk_usage(self._settings.folder).free
            except OSError as error:
                log.error("the recording's folder is gone", error=str(error))
                free = -1
            room = free >= self._settings.min_free
            if room != self._room:
                say = log.info if room else log.error
                say("recording goes on" if room else "recording stands still: the disk is too full",
                    free=free, min_free=self._settings.min_free)  # fmt: skip
            self._room = room
        return self._room


def _plain_previous(previous: Previous | None) -> dict[str, Any] | None:
    if previous is None:
        return None
    rows = [numbers(row) for row in previous.actions]
    return {"actions": rows, "delay": previous.delay, "horizon": previous.horizon}


def _plain(name: str) -> str:
    """A caller's name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:40] or "_"
