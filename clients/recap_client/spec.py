"""What a robot provides and accepts: cameras, state and action names with units, control rate, tasks.

The same object travels with the checkpoint, the exported model, the websocket handshake and the rollout log.
Two sides that disagree are refused with the field, what was expected and what came (`require_equal`).
"""

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


class SpecError(ValueError):
    """A spec is malformed, or two specs that must agree do not."""


@dataclass(frozen=True)
class Camera:
    """An RGB camera; frames are uint8 [height, width, 3]."""

    name: str
    height: int
    width: int


@dataclass(frozen=True)
class StateDim:
    """One entry of the state vector, in physical units (`unit` e.g. "m", "rad", "1" for dimensionless)."""

    name: str
    unit: str


@dataclass(frozen=True)
class ActionDim:
    """One entry of the action vector, in physical units, with the limits a robot accepts."""

    name: str
    unit: str
    low: float
    high: float


@dataclass(frozen=True)
class RobotSpec:
    """The contract between a robot, its data, a model trained on it and the service that runs the model."""

    robot: str
    cameras: tuple[Camera, ...]
    state: tuple[StateDim, ...]
    action: tuple[ActionDim, ...]
    control_hz: float
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("cameras", "state", "action"):
            names = [item.name for item in getattr(self, field)]
            if not names:
                raise SpecError(f"spec.{field}: expected at least one entry, got none")
            if len(set(names)) != len(names):
                raise SpecError(f"spec.{field}: expected distinct names, got {names}")
        if not self.control_hz > 0:
            raise SpecError(f"spec.control_hz: expected a positive rate in Hz, got {self.control_hz}")
        for dim in self.action:
            if not dim.low < dim.high:
                raise SpecError(f"spec.action[{dim.name}]: expected low < high, got {dim.low} and {dim.high}")

    @property
    def camera_names(self) -> tuple[str, ...]:
        return tuple(camera.name for camera in self.cameras)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for `json.dumps` or msgpack."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> "RobotSpec":
        """Inverse of `to_json`; an unknown or missing key, or a value of another type, raises `SpecError`."""
        try:
            cameras = tuple(Camera(**item) for item in data["cameras"])
            state = tuple(StateDim(**item) for item in data["state"])
            action = tuple(ActionDim(**item) for item in data["action"])
            robot, control_hz, tasks = data["robot"], data["control_hz"], data.get("tasks", ())
            _check_types(cameras, state, action)
            if not isinstance(tasks, list | tuple):
                raise SpecError(f"spec.tasks: expected a list of text, got {_shown(tasks)}")
            return RobotSpec(
                robot=text(robot, "spec.robot"),
                cameras=cameras,
                state=state,
                action=action,
                control_hz=finite(control_hz, "spec.control_hz"),
                tasks=tuple(text(task, "spec.tasks") for task in tasks),
            )
        except SpecError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            got = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise SpecError(f"robot spec: expected the fields of RobotSpec, got {got} ({error})") from error


def whole(value: Any, what: str, least: int = 1) -> int:
    """`value` when it is a whole number from `least`, else SpecError. what: the field, for the message."""
    if type(value) is not int or value < least:
        raise SpecError(f"{what}: expected a whole number from {least}, got {_shown(value)}")
    return value


def finite(value: Any, what: str) -> float:
    """`value` when it is a finite number, else SpecError."""
    result = number(value, what)
    if not math.isfinite(result):
        raise SpecError(f"{what}: expected a finite number, got {result}")
    return result


def number(value: Any, what: str) -> float:
    """`value` when it is a number, infinity among them, else SpecError."""
    if type(value) in (int, float):
        with contextlib.suppress(OverflowError):  # of an int beyond what a float holds
            result = float(value)
            if not math.isnan(result):
                return result
    raise SpecError(f"{what}: expected a number, got {_shown(value)}")


def text(value: Any, what: str) -> str:
    """`value` when it is text, else SpecError."""
    if type(value) is not str:
        raise SpecError(f"{what}: expected text, got {_shown(value)}")
    return value


def _check_types(cameras: Sequence[Camera], state: Sequence[StateDim], action: Sequence[ActionDim]) -> None:
    for field, entries in (("cameras", cameras), ("state", state), ("action", action)):
        for entry in entries:
            where = f"spec.{field}[{text(entry.name, f'spec.{field}.name')[:80]}]"
            if isinstance(entry, Camera):
                whole(entry.height, f"{where}.height")
                whole(entry.width, f"{where}.width")
            else:
                text(entry.unit, f"{where}.unit")
            if isinstance(entry, ActionDim):
                number(entry.low, f"{where}.low")
                number(entry.high, f"{where}.high")


def _shown(value: Any) -> str:
    return repr(value)[:80]


def require_equal(expected: RobotSpec, got: RobotSpec, *, what: str, tasks: bool = False) -> None:
    """Raise `SpecError` naming the first field in which `got` differs from `expected`.

    `tasks` is compared only when asked: a policy may know more tasks than a robot is set up for.
    """
    ours, theirs = expected.to_json(), got.to_json()
    for field in ("cameras", "state", "action", "control_hz") + (("tasks",) if tasks else ()):
        if ours[field] != theirs[field]:
            raise SpecError(f"{what}: spec.{field} differs: expected {ours[field]}, got {theirs[field]}")
