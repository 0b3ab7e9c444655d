"""How a service is to run. Secrets come from the environment and from nowhere else."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from recap_client.spec import RobotSpec

LogFormat = Literal["console", "json"]

API_KEY_VARIABLE = "RECAP_API_KEY"

_MEBIBYTE = 1 << 20
_HARD_LIMIT = 64 * _MEBIBYTE


@dataclass(frozen=True)
class Limits:
    """message: largest message that is decoded (`too_large` above it). frame: largest websocket frame that is received
    at all; a larger one closes the connection with 1009. Bytes."""

    message: int
    frame: int


def limits_for(robot: RobotSpec) -> Limits:
    """Room for every camera of the spec four times over (floats, or spare cameras), at least 8 and at most 32 MiB.

    Frames may be twice that, so that an oversized observation gets an error that says so before it gets a closed door.
    """
    raw = sum(camera.height * camera.width * 3 for camera in robot.cameras)
    message = min(max(4 * raw + _MEBIBYTE, 8 * _MEBIBYTE), _HARD_LIMIT // 2)
    return Limits(message, 2 * message)


@dataclass(frozen=True)
class PolicySettings:
    """beta: guidance strength, 1 = none. critic_url: where observations are forwarded to (`ws://host:port/value`), or
    None. critic_hz: at most so many forwarded observations a second and robot. seed: of the noise of sessions that
    send no seed of their own; None draws a fresh one. api_key: required of callers when set. lerobot_port, groot_port:
    where to listen for LeRobot's gRPC and GR00T's ZeroMQ clients, at the address `host`; 0 = a free one, None = not."""

    beta: float = 1.0
    critic_url: str | None = None
    critic_hz: float = 20.0
    seed: int | None = None
    api_key: str | None = None
    host: str = "127.0.0.1"
    lerobot_port: int | None = None
    groot_port: int | None = None


@dataclass(frozen=True)
class CriticSettings:
    """advantage_frames: N of the advantage, in control steps; None = one second. fall: an alarm when the value drops by
    this much below the best of the episode. stall: an alarm when the best value has not risen for this share of the
    task's longest successful episode. max_robots: as many are remembered; the one unseen for longest is forgotten."""

    advantage_frames: int | None = None
    fall: float = 0.15
    stall: float = 0.5
    max_robots: int = 256
    api_key: str | None = None


def api_key_from(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that callers must present, or None (an empty variable counts as none)."""
    return environment.get(API_KEY_VARIABLE) or None
