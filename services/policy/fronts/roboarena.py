"""RoboArena's additions to openpi's protocol: an `endpoint` in every message, a handshake that says what to send, and
DROID's names for cameras and state."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from recap_client.spec import RobotSpec
from recap_model.observation import ObservationError
from services.common.errors import bad_field

DIALECT = "roboarena"
PATH = "v1/realtime/robot/openpi"
"""Where the handshake is RoboArena's; vLLM-Omni serves it under the same path."""

RESET_REPLY = "reset successful"
_CARTESIAN = {"x", "y", "z", "dx", "dy", "dz"}
_JOINTS, _POSE, _GRIPPER = (f"observation/{name}_position" for name in ("joint", "cartesian", "gripper"))


def server_config(robot: RobotSpec) -> dict[str, Any]:
    """RoboArena's `PolicyServerConfig` for a robot: these keys and no others, for its client takes no others."""
    sizes = {(camera.height, camera.width) for camera in robot.cameras}
    wrist, outer = _cameras(robot)
    cartesian = any(dim.name.rpartition(".")[2].lower() in _CARTESIAN for dim in robot.action)
    velocity = any(dim.unit.endswith("/s") or "vel" in dim.name.lower() for dim in robot.action)
    return {
        "image_resolution": list(sizes.pop()) if len(sizes) == 1 else None,
        "needs_wrist_camera": bool(wrist),
        "n_external_cameras": min(len(outer), 2),
        "needs_stereo_camera": False,
        "needs_session_id": False,
        "action_space": f"{'cartesian' if cartesian else 'joint'}_{'velocity' if velocity else 'position'}",
    }


def endpoint(body: Mapping[str, Any]) -> str | None:
    """`infer`, `reset`, or None for a message of openpi's own. Raises ServiceError for any other."""
    if "endpoint" not in body:
        return None
    name = body["endpoint"]
    if not isinstance(name, str) or name not in ("infer", "reset"):
        got = repr(name[:40]) if isinstance(name, str) else type(name).__name__
        raise bad_field("bad_message", "endpoint", "infer or reset", got)
    return name


def session_id(body: Mapping[str, Any]) -> str | None:
    """The evaluation that a message belongs to, as text of at most 128 characters; None when it does not say.
    Raises ServiceError."""
    value = body.get("session_id")
    if value is None:
        return None
    if isinstance(value, np.ndarray) and value.size == 1:  # RoboArena's own form
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str | int | float):
        raise bad_field("bad_message", "session_id", "text or a number", type(value).__name__)
    return str(value)[:128]


def translated(body: Mapping[str, Any], robot: RobotSpec) -> dict[str, Any]:
    """The same observation under names that `openpi.read_observation` knows. Raises ObservationError."""
    images = body.get("images")
    named: dict[str, Any] = dict(body)
    wrist, outer = _cameras(robot)
    sent = dict.fromkeys(wrist, "wrist_image") | {name: f"exterior_image_{i}" for i, name in enumerate(outer)}
    for camera, name in sent.items():
        key = next((key for key in _sides(name) if key in body), None)
        if key is not None and f"observation/{camera}" not in body and not isinstance(images, Mapping):
            named[f"observation/{camera}"] = body[key]
    if "observation/state" not in body and any(key in body for key in (_JOINTS, _POSE)):
        named["observation/state"] = _state(body, robot)
    return named


def _state(body: Mapping[str, Any], robot: RobotSpec) -> Any:
    parts: dict[str, Any] = {}
    for key in (_JOINTS, _POSE, _GRIPPER):
        if key in body:
            name = key.removeprefix("observation/")
            try:
                value = np.asarray(body[key])
            except (ValueError, OverflowError) as error:
                raise ObservationError(name, "numbers", "lists of unequal lengths or depths") from error
            if value.dtype.kind not in "biuf":
                raise ObservationError(name, "numbers", f"dtype {value.dtype}"[:40])
            parts[key] = value.ravel()
    grips = any("grip" in dim.name.lower() for dim in robot.state)
    tails = ((_GRIPPER,), ()) if grips else ((), (_GRIPPER,))
    for tail in tails:
        for head in (_JOINTS, _POSE):
            keys = (head, *tail)
            if all(key in parts for key in keys) and sum(parts[key].size for key in keys) == len(robot.state):
                return np.concatenate([parts[key] for key in keys])
    sizes = {key.removeprefix("observation/"): part.size for key, part in parts.items()}
    names = ", ".join(dim.name for dim in robot.state)
    raise ObservationError("state", f"joint or cartesian position (and gripper) for {names}", f"{sizes}")


def _cameras(robot: RobotSpec) -> tuple[list[str], list[str]]:
    wrist = [name for name in robot.camera_names if re.search("wrist|hand", name.lower())]
    return wrist, [name for name in robot.camera_names if name not in wrist]


def _sides(name: str) -> tuple[str, str]:
    return f"observation/{name}_left", f"observation/{name}_right"
