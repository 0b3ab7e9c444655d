"""The messages of LeRobot's `transport.AsyncInference`: their protobuf framing, and what is in their pickles."""

from collections.abc import AsyncIterable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recap_client.spec import RobotSpec
from recap_model.observation import ObservationError
from services.common.errors import ServiceError, bad_field
from services.common.observation import Observation
from services.policy.fronts.pickle_data import Record, read

MODULES = tuple(
    f"lerobot.{folder}.{name}" for folder in ("async_inference", "scripts.server") for name in ("helpers", "readers")
)
"""Where LeRobot has kept the classes of its messages, newest first."""

BEGIN, MIDDLE, END = 1, 2, 3
_SETUP, _OBSERVATION = "RemotePolicyConfig", "TimedObservation"
_PIECE = 256  # bytes that even an empty piece costs
_STATE, _IMAGES = "observation.state", "observation.images."


@dataclass(frozen=True)
class Setup:
    """What a robot client announces. module: where it has its classes; rename: names of its cameras -> the spec's;
    actions: at most so many of a chunk, None = all."""

    module: str = MODULES[0]
    actions: int | None = None
    rename: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A robot's observation with its clock (`timestamp`, seconds since the epoch) and control step."""

    observation: Observation
    timestamp: float
    timestep: int
    module: str


async def receive_chunks(messages: AsyncIterable[bytes], limit: int) -> bytes:
    """Put the pieces of a `stream Observation` together: BEGIN, MIDDLE ..., END, or END alone.

    Raises ServiceError `bad_message`, or `too_large` before the piece that goes beyond `limit` bytes is kept.
    """
    parts: list[memoryview] = []
    size = 0
    async for message in messages:
        fields = read_fields(message)
        state, data = fields.get(1, 0), fields.get(2, memoryview(b""))
        if state not in (BEGIN, MIDDLE, END) or not isinstance(data, memoryview):
            raise bad_field("bad_message", "transfer_state", "BEGIN, MIDDLE or END", str(state)[:20])
        if state == BEGIN:
            parts, size = [], 0
        size += max(len(message), _PIECE)  # what is held for it, which its data may be a small part of
        if size > limit:
            raise bad_field("too_large", "observation", f"at most {limit} bytes", f"{size} bytes or more")
        parts.append(data)
        if state == END:
            return b"".join(parts)
    raise bad_field("bad_message", "transfer_state", "a last piece marked END", "the end of the stream")


def read_fields(message: bytes) -> dict[int, int | memoryview]:
    """The fields of a protobuf message by number, the last one of each; numbers and bytes only."""
    view, at = memoryview(message), 0
    fields: dict[int, int | memoryview] = {}
    while at < len(view):
        tag, at = _varint(view, at)
        kind = tag & 7
        if kind == 0:
            fields[tag >> 3], at = _varint(view, at)
            continue
        size, at = _varint(view, at) if kind == 2 else ({1: 8, 5: 4}.get(kind, len(view)), at)
        if at + size > len(view):
            raise bad_field("bad_message", "message", "a protobuf message", f"one cut short at byte {at}")
        fields[tag >> 3], at = view[at : at + size], at + size
    return fields


def write_bytes(number: int, data: bytes) -> bytes:
    """A protobuf message with one field of bytes; empty bytes are an empty message."""
    if not data:
        return b""
    size, length = len(data), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            break
        byte = view[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise bad_field("bad_message", "message", "a protobuf message", f"a broken number at byte {at}")


def read_setup(message: bytes, robot: RobotSpec) -> Setup:
    """The `PolicySetup` of a client, its cameras and state held against the served model's.

    Which policy the client names is of no account: the service serves the model it was started with.
    """
    data = read_fields(message).get(1, b"")
    if isinstance(data, int):
        raise bad_field("bad_message", "policy_setup", "bytes", "a number")
    record = _record(bytes(data), "policy_setup", _SETUP)
    actions = record.fields.get("actions_per_chunk")
    if type(actions) is not int or actions < 1:
        raise bad_field("bad_message", "actions_per_chunk", "a whole number from 1", str(actions)[:20])
    rename = record.fields.get("rename_map", {})
    if type(rename) is not dict or not all(type(name) is str for name in rename.values()):
        raise bad_field("bad_message", "rename_map", "a map of names", type(rename).__name__)
    names = {_camera(ours): _camera(theirs) for ours, theirs in rename.items()}
    _check_features(record.fields.get("lerobot_features"), robot, names)
    return Setup(record.module, actions, names)


def read_timed_observation(data: bytes, setup: Setup, robot: RobotSpec) -> Seen:
    """The observation of a client. Raises ServiceError or ObservationError."""
    record = _record(data, "observation", _OBSERVATION)
    raw, timestamp, timestep = (record.fields.get(name) for name in ("observation", "timestamp", "timestep"))
    if type(raw) is not dict:
        raise bad_field("bad_message", "observation", "a map of names to values", type(raw).__name__)
    if not isinstance(timestamp, float) or timestamp - timestamp != 0:
        raise bad_field("bad_message", "timestamp", "a finite number of seconds", str(timestamp)[:20])
    if type(timestep) is not int or not 0 <= timestep < 2**62:
        raise bad_field("bad_message", "timestep", "a whole number >= 0", str(timestep)[:20])
    named = {setup.rename.get(name, name): value for name, value in raw.items()}
    images = {camera: named[camera] for camera in robot.camera_names if camera in named}
    return Seen(Observation(images, _state(named, robot), named.get("task")), timestamp, timestep, record.module)


def _record(data: bytes, what: str, name: str) -> Record:
    record = read(data, what, [(module, name) for module in MODULES])
    if not isinstance(record, Record):
        raise bad_field("bad_message", what, f"a {name}", type(record).__name__)
    return record


def _state(raw: Mapping[str, Any], robot: RobotSpec) -> list[float]:
    values = []
    for dim in robot.state:
        value = raw.get(dim.name)
        if not isinstance(value, int | float):
            got = f"no such name among {_shown(raw)}" if value is None else type(value).__name__
            raise ObservationError(f"state[{dim.name}]", "a number", got)
        try:
            values.append(float(value))
        except OverflowError as error:
            raise ObservationError(f"state[{dim.name}]", "a number", "one too large") from error
    return values


def _check_features(features: Any, robot: RobotSpec, rename: Mapping[str, str]) -> None:
    """Refuse a robot that differs from the model's before it moves."""
    if type(features) is not dict:
        raise bad_field("bad_message", "lerobot_features", "a map of features", type(features).__name__)
    shapes: dict[str, Any] = {}
    names: Any = ()
    for key, feature in features.items():
        if type(feature) is not dict:
            raise bad_field("bad_message", f"lerobot_features[{key[:40]}]", "a map", type(feature).__name__)
        if key == _STATE:
            names = feature.get("names")
        elif key.startswith(_IMAGES):
            shapes[rename.get(_camera(key), _camera(key))] = feature.get("shape")
    sent = [name for name in names if type(name) is str] if isinstance(names, list | tuple) else []
    missing = [dim.name for dim in robot.state if dim.name not in sent]
    if missing:
        raise _mismatch("state", f"names {', '.join(dim.name for dim in robot.state)}", f"{_shown(sent)}")
    for camera in robot.cameras:
        want, got = (camera.height, camera.width, 3), shapes.get(camera.name)
        if not isinstance(got, list | tuple) or tuple(got) != want:
            sizes = f"no such camera among {_shown(shapes)}" if got is None else str(got)[:40]
            raise _mismatch(f"images[{camera.name}]", f"frames of {list(want)}", sizes)


def _mismatch(name: str, expected: str, got: str) -> ServiceError:
    return bad_field("bad_observation", f"lerobot_features: {name}", f"{expected} as the model was trained", got)


def _camera(key: str) -> str:
    return key.removeprefix(_IMAGES)


def _shown(names: Iterable[str]) -> list[str]:
    return sorted(name[:40] for name in names)[:20]
