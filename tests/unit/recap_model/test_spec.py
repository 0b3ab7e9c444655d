"""Specs come from files and from the wire: what is written is read back equal, and a wrong field is named."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recap_client.spec import ActionDim, Camera, RobotSpec, SpecError, StateDim
from recap_model.spec import CriticSpec, PolicySpec, Spec, spec_from_json, spec_to_json

names = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4, unique=True)
sizes = st.integers(1, 4096)
limits = st.floats(allow_nan=False)


@st.composite
def robots(draw: st.DrawFn) -> RobotSpec:
    pairs = st.tuples(limits, limits).map(sorted).filter(lambda pair: pair[0] < pair[1])
    return RobotSpec(
        draw(st.text()),
        tuple(Camera(name, draw(sizes), draw(sizes)) for name in draw(names)),
        tuple(StateDim(name, draw(st.text(max_size=4))) for name in draw(names)),
        tuple(ActionDim(name, "m", *draw(pairs)) for name in draw(names)),
        draw(st.floats(0.1, 1e4)),
        tuple(draw(st.lists(st.text(), max_size=3))),
    )


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    robot = draw(robots())
    if draw(st.booleans()):
        return PolicySpec(robot, draw(sizes), draw(sizes), names_in_prompt=draw(st.booleans()))
    steps = draw(st.dictionaries(st.text(), st.floats(1.0, 1e6), max_size=3))
    return CriticSpec(robot, draw(sizes), draw(st.integers(2, 500)), -1.0, 0.0, steps)


@given(specs())
def test_what_is_written_is_read_back_equal(spec: Spec) -> None:
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec


ROBOT = RobotSpec("arm", (Camera("front", 16, 16),), (StateDim("x", "m"),), (ActionDim("x", "m", -1.0, 1.0),), 10.0)
POLICY = spec_to_json(PolicySpec(ROBOT, 8, 16))
CRITIC = spec_to_json(CriticSpec(ROBOT, 16, 201, -1.0, 0.0, {"open": 80.0}))


def changed(spec: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with one part replaced."""
    copy: dict[str, Any] = json.loads(json.dumps(spec))
    part: Any = copy
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("spec", "path", "value", "message"),
    [
        (POLICY, ("chunk",), "8", "spec.chunk: expected a whole number from 1, got '8'"),
        (POLICY, ("chunk",), 8.0, "spec.chunk: expected a whole number from 1, got 8.0"),
        (POLICY, ("chunk",), True, "spec.chunk: expected a whole number from 1, got True"),
        (POLICY, ("chunk",), 0, "spec.chunk: expected a whole number from 1, got 0"),
        (POLICY, ("max_tokens",), None, "spec.max_tokens: expected a whole number from 1, got None"),
        (POLICY, ("family",), 3, "spec.family: expected text, got 3"),
        (POLICY, ("names_in_prompt",), 1, "spec.names_in_prompt: expected true or false, got 1"),
        (CRITIC, ("bins",), 1, "spec.bins: expected a whole number from 2, got 1"),
        (CRITIC, ("value_low",), "-1", "spec.value_low: expected a number, got '-1'"),
        (CRITIC, ("value_low",), -math.inf, "spec.value_low: expected a finite number, got -inf"),
        (CRITIC, ("value_low",), 0, "spec.value_low: expected less than value_high, got 0 and 0.0"),
        (CRITIC, ("value_high",), 10**400, f"spec.value_high: expected a number, got 1{'0' * 79}"),
        (CRITIC, ("t_max",), [1], "spec.t_max: expected a map of tasks to control steps, got [1]"),
        (CRITIC, ("t_max", "open"), "80", "spec.t_max[open]: expected a number, got '80'"),
        (CRITIC, ("t_max", "open"), 0.0, "spec.t_max[open]: expected control steps above 0, got 0.0"),
        (POLICY, ("robot", "control_hz"), "10", "spec.control_hz: expected a number, got '10'"),
        (POLICY, ("robot", "control_hz"), math.inf, "spec.control_hz: expected a finite number, got inf"),
        (POLICY, ("robot", "control_hz"), math.nan, "spec.control_hz: expected a number, got nan"),
        (POLICY, ("robot", "robot"), None, "spec.robot: expected text, got None"),
        (POLICY, ("robot", "tasks"), "open", "spec.tasks: expected a list of text, got 'open'"),
        (POLICY, ("robot", "tasks"), [1], "spec.tasks: expected text, got 1"),
        (POLICY, ("robot", "cameras", 0, "height"), 16.0,
         "spec.cameras[front].height: expected a whole number from 1, got 16.0"),
        (POLICY, ("robot", "cameras", 0, "width"), -1,
         "spec.cameras[front].width: expected a whole number from 1, got -1"),
        (POLICY, ("robot", "cameras", 0, "name"), 7, "spec.cameras.name: expected text, got 7"),
        (POLICY, ("robot", "state", 0, "unit"), None, "spec.state[x].unit: expected text, got None"),
        (POLICY, ("robot", "action", 0, "low"), "-1", "spec.action[x].low: expected a number, got '-1'"),
        (POLICY, ("robot", "action", 0, "high"), math.nan, "spec.action[x].high: expected a number, got nan"),
        (POLICY, ("robot", "action", 0, "high"), -2, "spec.action[x]: expected low < high, got -1.0 and -2"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(spec: dict[str, Any], path: tuple[str | int, ...], value: Any, message: str) -> None:
    with pytest.raises(SpecError) as error:
        spec_from_json(changed(spec, path, value))
    assert str(error.value) == message
