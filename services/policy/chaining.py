"""Real-time chunking in the service: what a request tells of the chunk that its robot is executing, as inputs of the
graph (`recap_model.rtc`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_client.spec import RobotSpec
from recap_model.rtc import Schedule, inpainting_weights, prefix_weights
from recap_model.spec import PolicySpec
from services.common.channel import number, whole
from services.common.errors import ServiceError, bad_field
from services.common.observation import with_text_keys

INPUTS = ("previous", "prefix_weights", "guidance_weights")

SCHEDULE: Schedule = "linear"
"""How the weight falls where a request asks for more rows than will have run."""


@dataclass(frozen=True)
class Previous:
    """actions float32 [n, A] in physical units, 1 <= n <= chunk: the rows of the robot's current chunk, the first for
    the control step of the observation. delay: how many of them will have run when the new chunk is there: it is held
    to these; horizon: as many more as it goes beyond `delay` hold it with a falling weight."""

    actions: NDArray[np.float32]
    delay: int
    horizon: int


@dataclass(frozen=True)
class Switched:
    """What the robot measured at its last switch of chunks. delay: control steps from observation to first action;
    seam: jump at the switch relative to the action range, None where there was nothing to compare with."""

    delay: int
    seam: float | None


def read_previous(body: Mapping[str, Any], spec: PolicySpec) -> Previous | None:
    """`previous`, `delay` and `horizon` of an `act` message; None without a `previous`. Raises ServiceError.

    Actions are clipped to the limits of the spec: that is all the robot can have been told to do.
    """
    delay, horizon = whole(body, "delay"), whole(body, "horizon")
    raw, width = body.get("previous"), len(spec.robot.action)
    if raw is None:
        return None
    want = f"float32 [1 to {spec.chunk}, {width}]"
    if not isinstance(raw, np.ndarray):
        raise bad_field("bad_message", "previous", want, type(raw).__name__)
    if raw.dtype.kind != "f" or raw.ndim != 2 or not 1 <= len(raw) <= spec.chunk or raw.shape[1] != width:
        raise bad_field("bad_message", "previous", want, f"{raw.dtype} {list(raw.shape)}")
    if not np.isfinite(raw).all():
        raise bad_field("bad_message", "previous", "finite numbers", "NaN or infinity")
    return Previous(_clipped(raw, spec.robot), delay or 0, (delay or 0) if horizon is None else horizon)


def read_switched(body: Mapping[str, Any]) -> Switched | None:
    """`switched` of an `act` message, None where it has none. Raises ServiceError."""
    raw = body.get("switched")
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise bad_field("bad_message", "switched", "a map with delay and seam", type(raw).__name__)
    parts = with_text_keys(raw)
    delay, seam = whole(parts, "delay"), number(parts, "seam")
    if delay is None:
        raise bad_field("bad_message", "delay", "a whole number >= 0 in `switched`", "none")
    if seam is not None and not 0 <= seam <= 1:
        raise bad_field("bad_message", "seam", "a number from 0 to 1", str(seam))
    return Switched(delay, seam)


def refusal() -> ServiceError:
    """A model that cannot continue a chunk was asked to."""
    return bad_field(
        "bad_message",
        "previous",
        "no previous chunk: this model was exported without real-time chunking (`recap export CHECKPOINT --rtc`)",
        "one",
    )


def graph_inputs(previous: Previous | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
    """The graph's three inputs, by its shapes `previous` [chunk, A], `prefix_weights` [chunk] and `guidance_weights`
    [denoise_steps]. Without a previous chunk: zeros, which are off."""
    inputs = {name: np.zeros(shapes[name], np.float32) for name in INPUTS}
    if previous is None:
        return inputs
    rows, (chunk, _) = len(previous.actions), shapes["previous"]
    horizon = min(previous.horizon, rows)  # what lies beyond is no action of the old chunk
    inputs["previous"][:rows] = previous.actions
    inputs["prefix_weights"] = prefix_weights(previous.delay, horizon, chunk, SCHEDULE)
    inputs["guidance_weights"] = inpainting_weights(*shapes["guidance_weights"])
    return inputs


def _clipped(actions: NDArray[Any], robot: RobotSpec) -> NDArray[np.float32]:
    low = np.array([dim.low for dim in robot.action], np.float64)
    high = np.array([dim.high for dim in robot.action], np.float64)
    return np.clip(actions, low, high).astype(np.float32)
