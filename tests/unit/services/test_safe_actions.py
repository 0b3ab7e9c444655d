"""No action leaves that is not finite, and none beyond the limits unless that was asked for."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recap_client.spec import ActionDim
from repository_factory import build_repository, robot_spec
from service_harness import NativeClient, act, policy_server
from services.common.errors import ServiceError
from services.policy.safe_actions import SafeActions

DIMS = (ActionDim("x", "m", -1.0, 1.0), ActionDim("grip", "1", 0.0, 0.5), ActionDim("free", "1", -np.inf, np.inf))
LOW, HIGH = np.array([dim.low for dim in DIMS]), np.array([dim.high for dim in DIMS])
CHUNKS = hnp.arrays(np.float32, (4, 3), elements=st.floats(-3, 3, width=32))


@settings(max_examples=50, deadline=None)
@given(CHUNKS, st.sampled_from(["clip", "refuse", "pass"]))
def test_what_leaves_is_within_the_limits_or_was_asked_for(
    actions: np.ndarray, limits: Literal["clip", "refuse", "pass"]
) -> None:
    events: list[str] = []
    safe = SafeActions(DIMS, limits, events.append)
    inside = np.clip(actions, LOW, HIGH)
    far = bool((np.abs(actions - inside) > 3e-5).any())
    if limits == "refuse" and far:
        with pytest.raises(ServiceError) as error:
            safe(actions)
        assert (error.value.fault.code, error.value.fault.field, events) == ("internal", "actions", ["limit"])
    elif limits != "refuse" or np.array_equal(actions, inside):
        sent = safe(actions)
        np.testing.assert_array_equal(sent, actions if limits == "pass" else inside.astype(np.float32))
        assert sent.dtype == np.float32
        assert not far or events == ["limit"]
        assert events == [] or not np.array_equal(actions, inside)


def test_the_arithmetic_of_float32_is_no_event() -> None:
    events: list[str] = []
    at_limit = np.array([[np.nextafter(np.float32(1), np.float32(2)), 0.5, 1e30]], np.float32)
    sent = SafeActions(DIMS, "refuse", events.append)(at_limit)
    assert events == [] and sent[0, 0] == 1.0


def test_refusals_name_the_dimension_and_the_number() -> None:
    with pytest.raises(ServiceError, match="beyond the robot's limits for grip; not sent") as error:
        SafeActions(DIMS, "refuse")(np.array([[0, 0.2, 0], [0, 0.75, 0]], np.float32))
    assert (error.value.fault.expected, error.value.fault.got) == ("grip from 0 to 0.5", "0.75")
    for bad in (np.nan, np.inf):
        events: list[str] = []
        with pytest.raises(ServiceError, match="NaN or infinite actions for grip, free"):
            SafeActions(DIMS, "pass", events.append)(np.array([[9, bad, -bad]], np.float32))
        assert events == ["nonfinite"]


def test_the_service_clips_counts_and_can_be_told_otherwise(tmp_path: Path) -> None:
    models = build_repository(tmp_path, models=["policy"])
    spec = robot_spec()
    for limits in ("clip", "refuse", "pass"):
        with policy_server(models, limits=limits) as served, NativeClient(served.url()) as client:
            served.engine.edit = lambda outputs: outputs | {"actions": outputs["actions"] * 0 + 7}
            reply = client.ask(act(spec))
            if limits == "refuse":
                assert (reply["code"], reply["field"], reply["got"]) == ("internal", "actions", "7")
            else:
                assert np.unique(reply["actions"]).tolist() == [1.0 if limits == "clip" else 7.0]
            assert 'recap_act_unsafe_total{kind="limit"} 1.0' in served.get("/metrics")[1]
