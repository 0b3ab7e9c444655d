"""A robot may say what it is; a model of another robot then refuses to move it."""

from collections.abc import Mapping
from typing import Any

from recap_client.spec import RobotSpec, SpecError, require_equal
from services.common.errors import ServiceError, bad_field


def check_spec(body: Mapping[str, Any], served: RobotSpec) -> None:
    """Hold the optional `spec` of a message (`RobotSpec.to_json`) against the served one: cameras, state, action, rate.

    Tasks may differ. Raises ServiceError `spec_mismatch` with the first part that differs, or `bad_message`.
    """
    sent = body.get("spec")
    if sent is None:
        return
    try:
        robot = RobotSpec.from_json(sent)
    except (SpecError, TypeError, ValueError, AttributeError) as error:
        raise bad_field("bad_message", "spec", "the fields of a robot spec", str(error)[:120]) from error
    try:
        require_equal(served, robot, what="the robot")
    except SpecError as error:
        ours, theirs = served.to_json(), robot.to_json()
        name = next(name for name in ("cameras", "state", "action", "control_hz") if ours[name] != theirs[name])
        raise ServiceError(
            "spec_mismatch",
            f"{error}; serve the model of this robot",
            field=f"spec.{name}",
            expected=str(ours[name]),
            got=str(theirs[name])[:2000],
        ) from error
