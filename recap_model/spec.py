"""What a trained model expects and returns, on top of the robot's own spec. numpy-free, JSON both ways."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recap_client.spec import RobotSpec, SpecError
from recap_model.conditioning import with_names


@dataclass(frozen=True)
class PolicySpec:
    """A policy: robot spec plus chunk length and text width.

    chunk: actions per reply, at `robot.control_hz`. max_tokens: prompt length after padding. names_in_prompt: behind
    the task, the prompt names the entries of state and action.
    """

    robot: RobotSpec
    chunk: int
    max_tokens: int
    family: str = "smolvla"
    names_in_prompt: bool = False

    kind = "policy"

    def text(self, task: str) -> str:
        """What takes the task's place in the prompt: the task, with the robot's names where the policy reads them."""
        if not self.names_in_prompt:
            return task
        return with_names(task, [dim.name for dim in self.robot.state], [dim.name for dim in self.robot.action])


@dataclass(frozen=True)
class CriticSpec:
    """A critic: robot spec plus the value support.

    bins values evenly spaced on [value_low, value_high]; t_max maps a task to the number of control steps that a value
    of -1 stands for (DESIGN 2.2: the longest successful episode of that task).
    """

    robot: RobotSpec
    max_tokens: int
    bins: int
    value_low: float
    value_high: float
    t_max: dict[str, float]
    family: str = "smolvla"

    kind = "critic"


Spec = PolicySpec | CriticSpec


def spec_to_json(spec: Spec) -> dict[str, Any]:
    """JSON object with a `kind` key ("policy" or "critic")."""
    return {"kind": spec.kind, **json.loads(json.dumps(asdict(spec)))}


def spec_from_json(data: dict[str, Any]) -> Spec:
    """Inverse of `spec_to_json`. Raises SpecError on an unknown kind or wrong fields."""
    if not isinstance(data, dict):
        raise SpecError(f"spec: expected a map, got {type(data).__name__}")
    fields = dict(data)
    kind = fields.pop("kind", None)
    types: dict[str, type[PolicySpec] | type[CriticSpec]] = {"policy": PolicySpec, "critic": CriticSpec}
    if not isinstance(kind, str) or kind not in types:
        raise SpecError(f"spec.kind: expected one of {sorted(types)}, got {kind!r}")
    fields["robot"] = RobotSpec.from_json(fields.get("robot", {}))
    try:
        return types[kind](**fields)
    except TypeError as error:
        raise SpecError(f"{kind} spec: {error}") from error


def read_spec(path: Path) -> Spec:
    """Read a `spec.json`."""
    return spec_from_json(json.loads(path.read_text()))


def write_spec(spec: Spec, path: Path) -> None:
    path.write_text(json.dumps(spec_to_json(spec), indent=1) + "\n")
