"""How a service is to run. Secrets come from the environment and from nowhere else."""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recap_client.spec import RobotSpec

LogFormat = Literal["console", "json"]
ActionLimits = Literal["clip", "refuse", "pass"]

API_KEY_VARIABLE = "RECAP_API_KEY"
ADMIN_KEY_VARIABLE = "RECAP_ADMIN_KEY"

_MEBIBYTE = 1 << 20
_HARD_LIMIT = 64 * _MEBIBYTE
_ITEMS = 1 << 14


@dataclass(frozen=True)
class Quota:
    """rate: requests a second; burst: so many at once after a pause, None = one second's worth, at least 1.
    bytes_per_s: of requests, with the same second of burst. in_flight, sessions: at the same time. None = no bound."""

    rate: float | None = None
    burst: float | None = None
    bytes_per_s: float | None = None
    in_flight: int | None = None
    sessions: int | None = None

    def __post_init__(self) -> None:
        for name in ("rate", "burst", "bytes_per_s", "in_flight", "sessions"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a number above 0, or none for no bound, got {value}")
        if self.burst is not None and (self.rate is None or self.burst < 1):
            raise ValueError(f"burst: expected at least 1, beside a rate, got {self.burst} with rate {self.rate}")


@dataclass(frozen=True)
class Tls:
    """cert: PEM, the service's certificate first, then those between it and the CA. key: PEM, without a password."""

    cert: Path
    key: Path


@dataclass(frozen=True)
class Access:
    """keys: file of API keys. quota: of callers whose key has none of its own, and of addresses where no key is asked;
    RECAP_API_KEY is the operator's own and without one. max_sessions: of all callers together. address_connections,
    max_connections: open TCP connections to the HTTP port, of one address (None = 64 more than `max_sessions`) and in
    all (None = twice that). request_s: seconds in which a peer must send the head of a request, and again its body."""

    keys: Path | None = None
    quota: Quota = field(default_factory=Quota)
    max_sessions: int = 512
    address_connections: int | None = None
    max_connections: int | None = None
    request_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("max_connections", "address_connections", "request_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")


@dataclass(frozen=True)
class Limits:
    """message: largest message that is decoded (`too_large` above it). frame: largest websocket frame that is received
    at all; a larger one closes the connection with 1009. Bytes. items: numbers and texts in a JSON body, of which a few
    bytes each make many in memory; lists and maps: a third of it (a pixel is a list of three)."""

    message: int
    frame: int
    items: int


def limits_for(robot: RobotSpec) -> Limits:
    """Room for every camera of the spec four times over (floats, or spare cameras), at least 8 and at most 32 MiB.

    Frames may be twice that, so that an oversized observation gets an error that says so before it gets a closed door.
    """
    raw = sum(camera.height * camera.width * 3 for camera in robot.cameras)
    message = min(max(4 * raw + _MEBIBYTE, 8 * _MEBIBYTE), _HARD_LIMIT // 2)
    return Limits(message, 2 * message, 2 * raw + _ITEMS)


@dataclass(frozen=True)
class Recording:
    """folder: where a service keeps what it served. images: how frames that came raw are kept, "png" (lossless) or
    "jpeg"; JPEG stays as it came. min_free: bytes that must stay free on the disk. gap_s: an episode ends after so long
    a silence. queue_bytes: of requests that may wait to be written."""

    folder: Path
    images: Literal["png", "jpeg"] = "png"
    min_free: int = 1 << 30
    gap_s: float = 30.0
    queue_bytes: int = 256 * _MEBIBYTE

    def __post_init__(self) -> None:
        if not self.gap_s > 0 or self.min_free < 0:
            raise ValueError(
                f"recording: expected a gap above 0 s and a floor from 0 bytes, got {self.gap_s} and {self.min_free}"
            )


@dataclass(frozen=True)
class ModelSource:
    """models: the model repository; nothing outside it is ever loaded. engine, threads: see `load_engine`.
    admin_key: of those who may change models. audit: file of the audit log; None = logged only. version: that was asked
    for at the start, None = the highest."""

    models: Path
    engine: str = "onnxruntime"
    threads: int = 1
    admin_key: str | None = None
    audit: Path | None = None
    version: int | None = None


@dataclass(frozen=True)
class PolicySettings:
    """beta: guidance strength, 1 = none. critic_url: where observations are forwarded to (`ws://host:port/value`), or
    None. critic_hz: at most so many forwarded observations a second and robot. seed: of the noise of sessions that
    send no seed of their own; None draws a fresh one. api_key: required of callers when set. lerobot_port, groot_port:
    where to listen for LeRobot's gRPC and GR00T's ZeroMQ clients, at the address `host`; 0 = a free one, None = not.
    limits: what happens to actions beyond the limits of the spec. access: keys and quotas. tls: of the gRPC port (that
    of HTTP is the server's). critic_tls: for a critic at `wss://`. source: where further models come from; None = the
    model cannot be changed. record: None = nothing is recorded. noise_scale: the flow begins at so much of its noise, 0
    (no chance: the same observation gives the same chunk) to 1 (as in training)."""

    beta: float = 1.0
    critic_url: str | None = None
    critic_hz: float = 20.0
    seed: int | None = None
    api_key: str | None = None
    host: str = "127.0.0.1"
    lerobot_port: int | None = None
    groot_port: int | None = None
    limits: ActionLimits = "clip"
    access: Access = field(default_factory=Access)
    tls: Tls | None = None
    critic_tls: ssl.SSLContext | None = None
    source: ModelSource | None = None
    record: Recording | None = None
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise_scale <= 1.0:
            raise ValueError(f"noise_scale: expected 0 to 1, got {self.noise_scale}")


@dataclass(frozen=True)
class CriticSettings:
    """advantage_frames: N of the advantage, in control steps; None = one second. fall: an alarm when the value drops by
    this much below the best of the episode. stall: an alarm when the best value has not risen for this share of the
    task's longest successful episode. max_robots: as many are remembered; the one unseen for longest is forgotten.
    api_key, access: as of the policy."""

    advantage_frames: int | None = None
    fall: float = 0.15
    stall: float = 0.5
    max_robots: int = 256
    api_key: str | None = None
    access: Access = field(default_factory=Access)


def api_key_from(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that callers must present, or None (an empty variable counts as none)."""
    return environment.get(API_KEY_VARIABLE) or None


def admin_key_from(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key of those who may change models, or None (an empty variable counts as none)."""
    return environment.get(ADMIN_KEY_VARIABLE) or None
