"""What a trained model expects and returns, on top of the robot's own spec. numpy-free, JSON both ways."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recap_client.spec import RobotSpec, SpecError, finite, text, whole
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
    """Inverse of `spec_to_json`. Raises SpecError on an unknown kind, and names the field that is wrong."""
    if not isinstance(data, dict):
        raise SpecError(f"spec: expected a map, got {type(data).__name__}")
    fields = dict(data)
    kind = fields.pop("kind", None)
    types: dict[str, type[PolicySpec] | type[CriticSpec]] = {"policy": PolicySpec, "critic": CriticSpec}
    if not isinstance(kind, str) or kind not in types:
        raise SpecError(f"spec.kind: expected one of {sorted(types)}, got {kind!r}")
    fields["robot"] = RobotSpec.from_json(fields.get("robot", {}))
    try:
        spec = types[kind](**fields)
    except TypeError as error:
        raise SpecError(f"{kind} spec: {error}") from error
    _check_types(spec)
    return spec


def _check_types(spec: Spec) -> None:
    text(spec.family, "spec.family")
    whole(spec.max_tokens, "spec.max_tokens")
    if isinstance(spec, PolicySpec):
        whole(spec.chunk, "spec.chunk")
        if type(spec.names_in_prompt) is not bool:
            raise SpecError(f"spec.names_in_prompt: expected true or false, got {spec.names_in_prompt!r:.80}")
        return
    whole(spec.bins, "spec.bins", 2)
    if not finite(spec.value_low, "spec.value_low") < finite(spec.value_high, "spec.value_high"):
        raise SpecError(f"spec.value_low: expected less than value_high, got {spec.value_low} and {spec.value_high}")
    if not isinstance(spec.t_max, dict):
        raise SpecError(f"spec.t_max: expected a map of tasks to control steps, got {spec.t_max!r:.80}")
    for task, steps in spec.t_max.items():
        if not finite(steps, f"spec.t_max[{text(task, 'spec.t_max')[:80]}]") > 0:
            raise SpecError(f"spec.t_max[{task[:80]}]: expected control steps above 0, got {steps}")


def read_spec(path: Path) -> Spec:
    """Read a `spec.json`."""
    return spec_from_json(json.loads(path.read_text()))


def write_spec(spec: Spec, path: Path) -> None:
    path.write_text(json.dumps(spec_to_json(spec), indent=1) + "\n")
