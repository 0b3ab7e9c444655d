"""The rollout log: one MCAP file an episode, readable in Foxglove and Rerun, and after a crash up to the last flush.

Channels (JSON messages): `/episode` once at the start, `/camera/<name>` (foxglove.CompressedImage) and `/step` for each
control step, `/outcome` once at the end. A file is written as `<name>.mcap.part` and renamed when it is whole.
Encoding and writing happen in a thread: the control loop only hands over references.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recap_client.images import encode_jpeg, encode_png
from recap_client.rollout import Rollout, RolloutError, read_rollout
from recap_client.rollout_file import RecordError, RolloutFile, numbers
from recap_client.spec import RobotSpec

__all__ = ["EpisodeInfo", "Outcome", "RecordError", "Recorder", "Rollout", "RolloutError", "StepRecord", "read_rollout"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodeInfo:
    """What is known when an episode starts.

    task: the prompt; task_name: the robot's own name of it. policy: name, version, hash of what acts at first, None for
    demonstrations. style: of the demonstrator. clock_offset_s: service clock minus robot clock, when measured.
    """

    spec: RobotSpec
    task: str
    task_name: str
    seed: int
    episode: str
    policy: Mapping[str, str] | None = None
    demonstration: bool = False
    style: str | None = None
    clock_offset_s: float | None = None


@dataclass(frozen=True)
class StepRecord:
    """One control step: what was seen at `t` (monotonic [s]), and the action executed then.

    proposed: what the policy wanted, None when it was not asked; chunk: number of the reply the action came from, -1
    for none; value: the critic's, None when unknown; model: that gave the chunk, None for the episode's `policy`.
    """

    step: int
    t: float
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    images: Mapping[str, NDArray[np.uint8]]
    proposed: NDArray[np.float32] | None = None
    chunk: int = -1
    intervention: bool = False
    value: float | None = None
    model: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Outcome:
    """How an episode ended. reason: "success" | "failure" or "discarded" (the operator's word, see `verdict`) |
    "timeout" | "operator" (Ctrl-C) | "stopped" (the emergency stop) | "error"; success None = not known."""

    success: bool | None
    steps: int
    reason: str
    missed_deadlines: int = 0


@dataclass
class _State:
    """Shared between the control loop and the writing thread (single assignments only)."""

    error: RecordError | None = None
    dropped: int = 0


class Recorder:
    """Records one episode to `path` (`.mcap`). `step` never raises and, unless `wait`, never blocks.

    image_format: "png" (lossless) or "jpeg". depth: steps that may wait to be written; beyond it a step is dropped and
    counted (`dropped`), or waited for with `wait=True` (collection faster than real time). When writing fails, `error`
    says why, the rest of the episode goes unrecorded, and what was written stays readable under `.part`.
    Raises RecordError at once if the file cannot be created or exists.
    """

    def __init__(self, path: Path, info: EpisodeInfo, *, image_format: str = "png", depth: int = 256,
                 wait: bool = False, flush_s: float = 0.5) -> None:  # fmt: skip
        if image_format not in ("png", "jpeg"):
            raise RecordError(f"image_format: expected 'png' or 'jpeg', got {image_format!r}")
        self.path, self.info = Path(path), info
        self._format, self._wait, self._flush_s = image_format, wait, flush_s
        self._queue: queue.Queue[StepRecord | Outcome] = queue.Queue(depth)
        self._state = _State()
        self._file = RolloutFile(self.path, info.spec.camera_names)
        self.part = self._file.part
        try:
            self._begin(info)
        except OSError as error:
            raise RecordError(f"{self.part}: cannot write the rollout log: {error}") from error
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()

    @property
    def error(self) -> RecordError | None:
        """Why writing stopped, or None."""
        return self._state.error

    @property
    def dropped(self) -> int:
        """Steps not written because the disk was too slow."""
        return self._state.dropped

    def step(self, record: StepRecord) -> None:
        """Hand over one control step. The arrays must not be changed afterwards."""
        if self._state.error is not None:
            return
        try:
            self._queue.put(record, block=self._wait, timeout=30.0 if self._wait else None)
        except queue.Full:
            self._state.dropped += 1

    def close(self, outcome: Outcome) -> RecordError | None:
        """Write the outcome, make the file durable and give it its name. Returns the error if the log is not whole."""
        self._queue.put(outcome)
        self._thread.join()
        return self._state.error

    def _begin(self, info: EpisodeInfo) -> None:
        self._file.add("/episode", time.monotonic(), {
            "spec": info.spec.to_json(), "robot": info.spec.robot, "task": info.task, "task_name": info.task_name,
            "seed": info.seed, "episode": info.episode, "policy": dict(info.policy) if info.policy else None,
            "demonstration": info.demonstration, "style": info.style, "control_hz": info.spec.control_hz,
            "clock_offset_s": info.clock_offset_s,
        })  # fmt: skip
        self._file.flush()

    def _write_all(self) -> None:
        flushed = time.monotonic()
        outcome: Outcome | None = None
        while outcome is None:
            try:
                item = self._queue.get(timeout=self._flush_s)
            except queue.Empty:
                item = None
            if self._state.error is None:
                try:
                    if isinstance(item, StepRecord):
                        self._write_step(item)
                    if time.monotonic() - flushed >= self._flush_s:
                        self._file.flush()
                        flushed = time.monotonic()
                except Exception as error:  # also a frame that cannot be encoded: the robot must not stop for its log
                    self._fail(error)
            if isinstance(item, Outcome):
                outcome = item
        self._finish(outcome)

    def _write_step(self, record: StepRecord) -> None:
        t = record.t
        encode = encode_png if self._format == "png" else encode_jpeg
        for camera, frame in record.images.items():
            self._file.add_image(camera, t, encode(frame), self._format, record.step)
        # after its images: a step that can be read has all of them
        self._file.add("/step", t, {
            "step": record.step, "t": t, "state": numbers(record.state), "action": numbers(record.action),
            "proposed": None if record.proposed is None else numbers(record.proposed), "chunk": record.chunk,
            "intervention": bool(record.intervention),
            "value": None if record.value is None or not math.isfinite(record.value) else float(record.value),
            **({"model": dict(record.model)} if record.model else {}),
        }, record.step)  # fmt: skip

    def _finish(self, outcome: Outcome) -> None:
        try:
            if self._state.error is not None:
                self._file.abandon()
                return
            self._file.add("/outcome", time.monotonic(), {
                "success": outcome.success, "steps": outcome.steps, "reason": outcome.reason,
                "missed_deadlines": outcome.missed_deadlines, "dropped": self._state.dropped,
            })  # fmt: skip
            self._file.finish()
        except OSError as error:
            if self._state.error is None:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._state.error = RecordError(
            f"{self.part}: writing the rollout log failed: {error}; this episode goes on unrecorded, "
            "what was written before stays readable: free the disk or choose another folder"
        )
        _log.error("%s", self._state.error)
