"""The file of a rollout log: MCAP with JSON messages, under a temporary name until it is whole.

`/episode` once at the start, `/camera/<name>` (foxglove.CompressedImage) and `/step` as often as something was seen,
`/value` for values that came later than their step, `/outcome` once at the end.
"""

import base64
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mcap.writer import CompressionType, Writer
from numpy.typing import NDArray

SCHEMA = "1"
_CHUNK_BYTES = 256 * 1024


class RecordError(RuntimeError):
    """The log of an episode cannot be written (disk full, no permission, file exists)."""


class RolloutFile:
    """Writes `path` (`.mcap`) as `<path>.part` and renames it when it is whole. For one thread.

    Raises RecordError if the file cannot be created or is there already; later writes raise OSError.
    """

    def __init__(self, path: Path, cameras: Iterable[str], *, library: str = "recap-client") -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        if self.path.exists():
            raise RecordError(f"{self.path}: expected no such file, got a finished recording; choose another folder")
        # maps the monotonic clock of the observations to wall time, which log viewers expect
        self._wall_offset = time.time() - time.monotonic()
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            _set_aside(self.part)
            self._stream = self.part.open("wb")
            self._writer: Any = Writer(self._stream, chunk_size=_CHUNK_BYTES, compression=CompressionType.ZSTD)
            self._channels = self._begin(cameras, library)
        except OSError as error:
            raise RecordError(f"{self.part}: cannot write the rollout log: {error}") from error

    def _begin(self, cameras: Iterable[str], library: str) -> dict[str, int]:
        writer = self._writer
        writer.start(profile="", library=library)
        writer.add_metadata("recap", {"schema": SCHEMA})
        schemas = {name: writer.register_schema(name, "jsonschema", json.dumps(schema).encode())
                   for name, schema in _SCHEMAS.items()}  # fmt: skip
        channels = {topic: writer.register_channel(topic, "json", schemas[f"recap.{topic[1:]}"])
                    for topic in ("/episode", "/step", "/value", "/outcome")}  # fmt: skip
        for camera in cameras:
            topic = f"/camera/{camera}"
            channels[topic] = writer.register_channel(topic, "json", schemas["foxglove.CompressedImage"])
        return channels

    def add(self, topic: str, t: float, message: Mapping[str, Any], sequence: int = 0) -> None:
        """One message at `t` (monotonic [s] of this machine)."""
        stamp = int((t + self._wall_offset) * 1e9)
        data = json.dumps(message, allow_nan=False).encode()
        self._writer.add_message(self._channels[topic], stamp, data, stamp, sequence)

    def add_image(self, camera: str, t: float, data: bytes, form: str, sequence: int) -> None:
        """One encoded frame. form: "png" or "jpeg"."""
        seconds, nanoseconds = divmod(int((t + self._wall_offset) * 1e9), 10**9)
        self.add(f"/camera/{camera}", t, {
            "timestamp": {"sec": seconds, "nsec": nanoseconds}, "frame_id": camera, "format": form,
            "data": base64.b64encode(data).decode(),
        }, sequence)  # fmt: skip

    def flush(self) -> None:
        """Hand everything so far to the operating system: a crash of this process loses nothing of it."""
        self._writer.flush()

    def finish(self) -> None:
        """End the file, make it durable and give it its name. Raises OSError."""
        self._writer.finish()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self.part, self.path)

    def abandon(self) -> None:
        """Close the file as it is; it stays readable under `.part`. Raises OSError."""
        self._stream.close()


def numbers(array: NDArray[np.float32]) -> list[float | None]:
    """Valid JSON has no NaN: it is written as null."""
    return [float(x) if math.isfinite(x) else None for x in np.asarray(array, np.float32)]


def _set_aside(part: Path) -> None:
    """What an interrupted run left under this name is kept, as `.part.N`."""
    if part.exists():
        number = 1
        while (kept := part.with_name(f"{part.name}.{number}")).exists():
            number += 1
        part.replace(kept)


_VECTOR = {"type": "array", "items": {"type": ["number", "null"]}}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "recap.episode": {"type": "object", "properties": {"task": {"type": "string"}, "spec": {"type": "object"}}},
    "recap.step": {"type": "object", "properties": {
        "step": {"type": "integer"}, "t": {"type": "number"}, "state": _VECTOR, "action": _VECTOR,
        "proposed": _VECTOR, "chunk": {"type": "integer"}, "intervention": {"type": "boolean"},
        "value": {"type": ["number", "null"]}, "model": {"type": "object"}}},
    "recap.value": {"type": "object", "properties": {"step": {"type": "integer"}, "value": {"type": "number"}}},
    "recap.outcome": {"type": "object", "properties": {
        "success": {"type": ["boolean", "null"]}, "steps": {"type": "integer"}, "reason": {"type": "string"},
        "missed_deadlines": {"type": "integer"}, "dropped": {"type": "integer"}}},
    "foxglove.CompressedImage": {"title": "foxglove.CompressedImage", "type": "object", "properties": {
        "timestamp": {"type": "object", "title": "time",
                      "properties": {"sec": {"type": "integer"}, "nsec": {"type": "integer"}}},
        "frame_id": {"type": "string"}, "data": {"type": "string", "contentEncoding": "base64"},
        "format": {"type": "string"}}},
}  # fmt: skip
