"""What a robot provides and accepts: cameras, state and action names with units, control rate, tasks.

The same object travels with the checkpoint, the exported model, the websocket handshake and the rollout log.
Two sides that disagree are refused with the field, what was expected and what came (`require_equal`).
"""

import json
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
        """Inverse of `to_json`; an unknown or missing key raises `SpecError`."""
        try:
            return RobotSpec(
                robot=data["robot"],
                cameras=tuple(Camera(**item) for item in data["cameras"]),
                state=tuple(StateDim(**item) for item in data["state"]),
                action=tuple(ActionDim(**item) for item in data["action"]),
                control_hz=float(data["control_hz"]),
                tasks=tuple(data.get("tasks", ())),
            )
        except SpecError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            got = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise SpecError(f"robot spec: expected the fields of RobotSpec, got {got} ({error})") from error


def require_equal(expected: RobotSpec, got: RobotSpec, *, what: str, tasks: bool = False) -> None:
    """Raise `SpecError` naming the first field in which `got` differs from `expected`.

    `tasks` is compared only when asked: a policy may know more tasks than a robot is set up for.
    """
    ours, theirs = expected.to_json(), got.to_json()
    for field in ("cameras", "state", "action", "control_hz") + (("tasks",) if tasks else ()):
        if ours[field] != theirs[field]:
            raise SpecError(f"{what}: spec.{field} differs: expected {ours[field]}, got {theirs[field]}")
