"""GR00T's observations and actions, which come in named parts, to and from the vectors of a robot's spec."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_client.spec import RobotSpec
from recap_model.observation import ObservationError
from services.common.errors import bad_field
from services.common.observation import Observation
from services.policy.fronts.groot_codec import modality_config

LANGUAGE = "annotation.human.task_description"
_LEVELS = 3  # of lists of one around a text

Parts = Mapping[str, Sequence[int]]
"""Name of a part -> the entries of the vector that it holds."""


@dataclass(frozen=True)
class Form:
    """How a client spoke, and so is answered. listed: [actions, info] (N1.6 on) instead of the actions alone; flat:
    keys `action.PART` instead of PART; batched: arrays are [1, T, D] instead of [T, D]; parts: of its state."""

    listed: bool
    flat: bool
    batched: bool
    parts: Parts


def read_observation(data: Any, robot: RobotSpec) -> tuple[Observation, Form]:
    """The `data` of a `get_action`: N1.5's flat map, or N1.6's and N1.7's `{"observation": ...}`, nested or flat.

    One frame of one robot, in whatever number of leading dimensions of size 1. Raises ServiceError, ObservationError.
    """
    if not isinstance(data, Mapping):
        raise bad_field("bad_message", "data", "a map with the observation", type(data).__name__)
    listed = isinstance(data.get("observation"), Mapping)
    body: Mapping[str, Any] = data["observation"] if listed else data
    flat = not any(isinstance(body.get(name), Mapping) for name in ("video", "state", "language"))
    video, state = _named(body, "video", flat), _named(body, "state", flat)
    batched = listed or any(isinstance(frame, np.ndarray) and frame.ndim == 5 for frame in video.values())
    images = {name: _frame(video[name], name) for name in robot.camera_names if name in video}
    vector, parts = _state(state, robot)
    return Observation(images, vector, _prompt(body, flat)), Form(listed, flat, batched, parts)


def write_actions(actions: NDArray[np.float32], form: Form, robot: RobotSpec, info: Mapping[str, Any]) -> Any:
    """A reply for actions [T, A]: the parts of the action named as the spec names them, or as the state's were when
    both vectors have one layout."""
    prefix = "action." if form.flat else ""
    parts = _action_parts(form.parts, robot)
    values = {prefix + name: np.ascontiguousarray(actions[:, list(indices)]) for name, indices in parts.items()}
    if form.batched:
        values = {name: value[None] for name, value in values.items()}
    return [values, dict(info)] if form.listed else values


def describe(robot: RobotSpec, chunk: int, *, as_text: bool) -> dict[str, Any]:
    """The answer to `get_modality_config`."""
    names = {
        "video": ([0], list(robot.camera_names)),
        "state": ([0], list(groups([dim.name for dim in robot.state]))),
        "action": (list(range(chunk)), list(groups([dim.name for dim in robot.action]))),
        "language": ([0], [LANGUAGE]),
    }
    return {kind: modality_config(deltas, keys, as_text=as_text) for kind, (deltas, keys) in names.items()}


def groups(names: Sequence[str]) -> dict[str, list[int]]:
    """The parts that a vector's names make by themselves: `arm.0`, `arm.1` are the part `arm`, `x` is the part `x`."""
    parts: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        parts.setdefault(name.rpartition(".")[0] or name, []).append(index)
    return parts


def by_name(parts: Mapping[str, int], names: Sequence[str]) -> dict[str, list[int]] | None:
    """Where parts of the given sizes sit in a vector: PART stands for the entry PART, or for the entries PART.*.

    None when that leaves a part or an entry over.
    """
    found = {part: _entries(part, names) for part in parts}
    fits = all(len(found[part]) == size for part, size in parts.items())
    return found if fits and sum(parts.values()) == len(names) else None


def placed(parts: Mapping[str, int], names: Sequence[str]) -> dict[str, list[int]] | None:
    """The same, where parts under names of the client's own (`single_arm`) take the entries that are left, in the order
    in which they came. None when a named part has another size, or the sizes do not add up."""
    found = {part: _entries(part, names) for part in parts}
    taken = {index for indices in found.values() for index in indices}
    left = [index for index in range(len(names)) if index not in taken]
    for part, size in parts.items():
        if not found[part]:
            found[part], left = left[:size], left[size:]
    fits = all(len(found[part]) == size for part, size in parts.items())
    return found if fits and not left else None


def _entries(part: str, names: Sequence[str]) -> list[int]:
    return [index for index, name in enumerate(names) if (name + ".").startswith(part + ".")]


def _named(body: Mapping[str, Any], kind: str, flat: bool) -> dict[str, Any]:
    if flat:
        return {key.removeprefix(f"{kind}."): value for key, value in body.items() if key.startswith(f"{kind}.")}
    values = body.get(kind, {})
    if not isinstance(values, Mapping):
        raise bad_field("bad_message", kind, "a map of names to arrays", type(values).__name__)
    return dict(values)


def _frame(value: Any, name: str) -> Any:
    if not isinstance(value, np.ndarray) or not 3 <= value.ndim <= 5:
        return value  # for the check against the spec to judge
    if any(size != 1 for size in value.shape[:-3]):
        raise ObservationError(f"images[{name}]", "one frame of one robot", f"{value.dtype} {list(value.shape)}")
    return value.reshape(value.shape[-3:])


def _state(state: Mapping[str, Any], robot: RobotSpec) -> tuple[NDArray[np.float64], Parts]:
    names = [dim.name for dim in robot.state]
    values = {}
    for part, value in state.items():
        numbers = isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.ndim > 0
        if not numbers or value.size != value.shape[-1]:
            raise ObservationError(f"state[{part}]", "numbers of one moment of one robot", _kind(value))
        values[part] = value.reshape(-1)
    sizes = {part: len(value) for part, value in values.items()}
    parts = placed(sizes, names)
    if parts is None:
        raise ObservationError("state", f"parts that make up {', '.join(names)}", f"{dict(list(sizes.items())[:20])}")
    vector = np.zeros(len(names))
    for part, indices in parts.items():
        vector[indices] = values[part]
    return vector, parts


def _action_parts(parts: Parts, robot: RobotSpec) -> Parts:
    names = [dim.name for dim in robot.action]
    named = by_name({part: len(indices) for part, indices in parts.items()}, names)
    if named is not None:
        return named
    return parts if len(names) == len(robot.state) else groups(names)


def _prompt(body: Mapping[str, Any], flat: bool) -> Any:
    if flat:
        found = [value for key, value in body.items() if key.startswith(("annotation.", "language.")) or key == "task"]
    else:
        language = body.get("language")
        found = list(language.values()) if isinstance(language, Mapping) else []
    if len(found) != 1:
        raise ObservationError("prompt", f"one text, under {LANGUAGE} or another name", f"{len(found)} of them")
    value = found[0].tolist() if isinstance(found[0], np.ndarray) else found[0]
    for _ in range(_LEVELS):
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
