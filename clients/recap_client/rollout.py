"""Reading a rollout log back. A truncated file gives its readable part, marked as incomplete."""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mcap.records import Channel, Footer, Message
from mcap.stream_reader import StreamReader
from numpy.typing import NDArray

from recap_client.images import ImageError, decode_jpeg, decode_png
from recap_client.spec import RobotSpec

_RECORD_LIMIT = 512 * 2**20


class RolloutError(ValueError):
    """A file is not a rollout log, or nothing of it can be read."""


@dataclass(frozen=True)
class Rollout:
    """One recorded episode of T control steps.

    task: the prompt. t float64 [T] monotonic s; state float32 [T, S]; action float32 [T, A] as executed; proposed
    float32 [T, A], NaN where the policy was not asked; chunk int64 [T]; intervention bool [T]; value float64 [T], NaN
    where unknown; images: camera -> uint8 [T, H, W, 3] (empty when read with images=False).
    complete: the file was closed properly; else success is None and the last steps may be missing.
    models: step -> name, version and hash of the model that gave its chunk, where that was another than `policy`, for
    models change while robots are served.
    source: "robot", or "service" for a log of the policy service, whose steps are the robot's requests: `action` is NaN
    (what the robot executed is not known there) and `proposed` the first action of the chunk it was sent.
    """

    path: Path
    spec: RobotSpec
    task: str
    task_name: str
    seed: int
    episode: str
    policy: Mapping[str, str] | None
    demonstration: bool
    style: str | None
    control_hz: float
    clock_offset_s: float | None
    t: NDArray[np.float64]
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    proposed: NDArray[np.float32]
    chunk: NDArray[np.int64]
    intervention: NDArray[np.bool_]
    value: NDArray[np.float64]
    images: Mapping[str, NDArray[np.uint8]]
    success: bool | None
    reason: str
    missed_deadlines: int
    dropped: int
    complete: bool
    source: str = "robot"
    models: Mapping[int, Mapping[str, str]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.t)


def read_rollout(path: Path, *, images: bool = True) -> Rollout:
    """Read a `.mcap` or `.mcap.part` file. Raises RolloutError when it is no rollout log or its start is unreadable."""
    path = Path(path)
    topics: dict[str, dict[int, dict[str, Any]]] = {}
    complete, problem = False, "the file ends early"
    try:
        for topic, sequence, message in messages(path, images=images):
            topics.setdefault(topic, {})[sequence] = message
        complete = "/outcome" in topics
    except OSError as error:
        raise RolloutError(f"{path}: cannot read the rollout log: {error}") from error
    except Exception as error:  # a damaged tail can break the parser anywhere; what came before it is good
        problem = f"{type(error).__name__}: {error}"
    if 0 not in topics.get("/episode", {}):
        raise RolloutError(f"{path}: expected a rollout log (MCAP with an /episode message), got none: {problem}")
    try:
        return _assemble(path, topics, images, complete)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise RolloutError(f"{path}: expected the rollout log of schema 1, got a message that does not fit it: "
                           f"{type(error).__name__}: {error}") from error  # fmt: skip


def messages(path: Path, *, images: bool = True) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(topic, sequence, message) as they were written, in file order; raises whatever the parser raises where the file
    is damaged."""
    channels: dict[int, str] = {}
    footer = False
    with path.open("rb") as stream:
        for record in StreamReader(stream, validate_crcs=True, record_size_limit=_RECORD_LIMIT).records:
            if isinstance(record, Channel):
                channels[record.id] = record.topic
            elif isinstance(record, Message):
                topic = channels[record.channel_id]
                if images or not topic.startswith("/camera/"):
                    yield topic, record.sequence, json.loads(record.data)
            elif isinstance(record, Footer):
                footer = True
    if not footer:
        raise RolloutError("no footer")


def _assemble(path: Path, topics: dict[str, dict[int, dict[str, Any]]], images: bool, complete: bool) -> Rollout:
    head = topics["/episode"][0]
    spec = RobotSpec.from_json(head["spec"])
    cameras = {name: topics.get(f"/camera/{name}", {}) for name in spec.camera_names}
    recorded = {name: frames for name, frames in cameras.items() if frames}
    # a step whose image fell into the damaged part does not count
    steps = [step for number, step in sorted(topics.get("/step", {}).items())
             if all(number in frames for frames in recorded.values())]  # fmt: skip
    numbers = [step["step"] for step in steps]
    late = topics.get("/value", {})
    outcome = topics.get("/outcome", {}).get(0, {}) if complete else {}
    width = len(spec.action)
    return Rollout(
        path=path, spec=spec, task=head["task"], task_name=head["task_name"], seed=int(head["seed"]),
        episode=head["episode"], policy=head["policy"], demonstration=bool(head["demonstration"]), style=head["style"],
        control_hz=float(head["control_hz"]), clock_offset_s=head["clock_offset_s"],
        t=np.array([step["t"] for step in steps], np.float64),
        state=_matrix([step["state"] for step in steps], len(spec.state)),
        action=_matrix([step["action"] for step in steps], width),
        proposed=_matrix([step["proposed"] or [None] * width for step in steps], width),
        chunk=np.array([step["chunk"] for step in steps], np.int64),
        intervention=np.array([step["intervention"] for step in steps], np.bool_),
        value=np.array([late.get(step["step"], {}).get("value", step["value"]) for step in steps], np.float64),
        images={name: _frames(frames, numbers, spec, name) for name, frames in recorded.items()} if images else {},
        success=outcome.get("success"), reason=outcome.get("reason", "interrupted"),
        missed_deadlines=int(outcome.get("missed_deadlines", 0)), dropped=int(outcome.get("dropped", 0)),
        complete=complete, source=str(head.get("source", "robot")),
        models=_other_models(steps, head["policy"]),
    )  # fmt: skip


def _other_models(steps: list[dict[str, Any]], policy: object) -> dict[int, Mapping[str, str]]:
    return {row: dict(step["model"]) for row, step in enumerate(steps) if step.get("model", policy) != policy}


def _matrix(rows: list[list[float | None]], width: int) -> NDArray[np.float32]:
    matrix = np.array(rows, np.float64).reshape(-1, width) if rows else np.zeros((0, width))
    return matrix.astype(np.float32)


def _frames(frames: dict[int, dict[str, Any]], numbers: list[int], spec: RobotSpec, name: str) -> NDArray[np.uint8]:
    camera = next(camera for camera in spec.cameras if camera.name == name)
    stack = np.empty((len(numbers), camera.height, camera.width, 3), np.uint8)
    for row, number in enumerate(numbers):
        decode = decode_png if frames[number]["format"] == "png" else decode_jpeg
        frame = decode(base64.b64decode(frames[number]["data"]))
        if frame.shape != stack.shape[1:]:
            raise ImageError(f"/camera/{name} step {number}: expected {list(stack.shape[1:])}, got {list(frame.shape)}")
        stack[row] = frame
    return stack
