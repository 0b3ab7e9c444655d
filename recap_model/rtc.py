"""Real-time chunking (arXiv 2506.07339) as LeRobot computes it, in closed form: numbers only, no gradient.

LeRobot's `RTCProcessor` evaluates the velocity before it asks for gradients, so its correction is the weighted error
itself and not a vector-Jacobian product through the model. The guidance is therefore three arrays that enter a static
graph as inputs: the previous chunk, one weight per action, one factor per denoising step. Zeros switch it off.
numpy only.
"""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Schedule = Literal["linear", "exp", "ones", "zeros"]
SCHEDULES: tuple[Schedule, ...] = ("linear", "exp", "ones", "zeros")


def prefix_weights(delay: int, horizon: int, chunk: int, schedule: Schedule = "linear") -> NDArray[np.float32]:
    """float32 [chunk]: how firmly each action is held to the previous chunk.

    delay: actions that will have run before the new chunk arrives (weight 1); horizon: actions that the two chunks
    share (weight 0 from there on); in between the weight falls by `schedule`. Both in control steps.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")
    if delay < 0 or horizon < 0:
        raise ValueError(f"delay, horizon: expected 0 or more control steps, got {delay} and {horizon}")
    end = min(horizon, chunk)
    start = min(delay, horizon)
    weights = np.zeros(chunk, np.float32)
    weights[: min(start, chunk)] = 1.0
    if schedule == "ones":
        weights[:end] = 1.0
    elif schedule != "zeros" and end > start:
        fall = np.linspace(1.0, 0.0, end - start + 2, dtype=np.float32)[1:-1]
        weights[start:end] = fall * np.expm1(fall) / (math.e - 1) if schedule == "exp" else fall
    return weights


def guidance_weights(steps: int, maximum: float = 10.0) -> NDArray[np.float32]:
    """float32 [steps]: factor of the correction at each denoising step, first step (pure noise) first."""
    if not maximum > 0:
        raise ValueError(f"maximum: expected a positive guidance weight, got {maximum}")
    tau = np.arange(steps, dtype=np.float64) / steps
    with np.errstate(divide="ignore"):
        weight = (1 - tau) / tau * ((1 - tau) ** 2 + tau**2) / (1 - tau) ** 2
    return np.minimum(weight, maximum).astype(np.float32)


def inpainting_weights(steps: int) -> NDArray[np.float32]:
    """float32 [steps]: factor of the correction at each denoising step, 1 / t at noise level t = 1 - i / steps.

    The corrected velocity is then v + weight * ((x - previous) / t - v): a row of weight 1 goes straight from its noise
    to the previous action, so it is at every step what the flow was trained on (t noise + (1 - t) action) and ends on
    the action itself. LeRobot's factors (`guidance_weights`) overshoot at first, and with 8 steps leave
    a tenth of the last error.
    """
    return (steps / (steps - np.arange(steps))).astype(np.float32)


def correct(velocity: Any, x: Any, time: float, previous: Any, weights: Any, guidance: Any) -> Any:
    """The guided velocity. Works on numpy arrays and torch tensors alike.

    velocity, x (noisy actions at noise level `time`, 1 = noise) and previous [B, T, A], normalised;
    weights [B, T, 1]; guidance [B, 1, 1].
    """
    return velocity - guidance * ((previous - (x - time * velocity)) * weights)
