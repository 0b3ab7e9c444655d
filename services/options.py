"""The options of `recap serve` and `recap bench`; light, for `--help` must not import a web server."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from services.common.settings import ActionLimits, LogFormat


@dataclass(frozen=True)
class ServeArgs:
    """Serve exported models to robots."""

    what: Annotated[Literal["policy", "critic", "all"], tyro.conf.Positional]
    """Which service; `all` runs both, each in a process of its own, and forwards what the policy sees to the critic."""
    models: Path
    """Model repository, as `recap export` writes it."""
    model_version: int | None = None
    """Version of the policy to start with, the highest by default. Name one, or a restart undoes a rollback."""
    policy_port: int = 8000
    critic_port: int = 8001
    lerobot_port: int | None = None
    """Also serve LeRobot's asynchronous inference (gRPC) here; its own server uses 8080. Needs the extra `fronts`."""
    groot_port: int | None = None
    """Also serve GR00T's protocol (ZeroMQ) here; its own server uses 5555. Needs the extra `fronts`."""
    host: str = "127.0.0.1"
    """Address to listen on. Ask for a key (`--keys`, or RECAP_API_KEY in the environment) before others reach it."""
    keys: Path | None = None
    """File of API keys, as `recap keys add` writes it; followed while the service runs."""
    tls_cert: Path | None = None
    """Certificate (PEM) for https, wss and LeRobot's gRPC; GR00T's protocol has no TLS."""
    tls_key: Path | None = None
    """Its key (PEM, without a password)."""
    max_sessions: int = 512
    """Sessions of all callers together."""
    address_connections: int | None = None
    """Open connections of one address to the HTTP port; by default 64 more than `--max-sessions`."""
    max_connections: int | None = None
    """The same of all addresses; by default twice that."""
    request_timeout: float = 10.0
    """Seconds in which a peer must send the head of a request, and again its body. Open websockets may be silent."""
    rate: float | None = None
    """Requests a second of one caller: a key that has no limits of its own, or an address where no key is asked."""
    bytes_per_s: float | None = None
    """Bytes of requests a second of one such caller."""
    in_flight: int | None = None
    """Unanswered requests at once of one such caller."""
    sessions: int | None = None
    """Sessions at once of one such caller."""
    limits: ActionLimits = "clip"
    """Actions beyond the limits of the robot's spec: put on the limit, refuse the chunk, or pass them on."""
    engine: str = "onnxruntime"
    """onnxruntime, or torch for a model exported with `--target torch` (the critic runs on onnxruntime then), or
    triton: policy and critic of a Triton server."""
    triton_url: str | None = None
    """grpc://HOST:PORT or http://HOST:PORT of that server, grpc://127.0.0.1:8001 by default (docs/triton.md)."""
    engine_threads: int = 1
    """CPU threads of the policy's engine; more help large models, and take cores from the robot's own loop."""
    beta: float = 1.0
    """Classifier-free guidance strength; 1 = none."""
    critic_url: str | None = None
    """Where `policy` forwards observations to, e.g. ws://host:8001/value; set by itself with `all`."""
    critic_ca: Path | None = None
    """CA (PEM) of a critic at wss://; without it those of the system. Not needed with `all`."""
    critic_hz: float = 20.0
    """Forward at most so many observations a second and robot."""
    seed: int | None = None
    """Seed of the flow noise of sessions that send none."""
    noise_scale: float = 1.0
    """How much of its noise the flow begins at: 1 as in training, 0 for no chance at all (docs/protocol.md)."""
    record: Path | None = None
    """Keep what was served here, one MCAP an episode, for robots whose client cannot record (docs/recording.md)."""
    record_images: Literal["png", "jpeg"] = "png"
    """How frames that came raw are kept: png (lossless) or jpeg (small). JPEG stays as it came."""
    record_min_free: float = 1.0
    """GiB that must stay free on the disk; below it nothing is recorded."""
    record_gap: float = 30.0
    """Seconds of silence after which an episode is over, where the robot's protocol does not say so."""
    audit: Path | None = None
    """File that changes of models are appended to, as JSON lines; without it they are only logged (docs/models.md)."""
    log_format: LogFormat = "console"


@dataclass(frozen=True)
class BenchArgs:
    """Measure what the service adds to the model: round trips over loopback against bare engine calls."""

    models: Path
    """Model repository with a `policy`."""
    requests: int = 500
    warm_up: int = 50
    beta: float = 1.0
    engine: str = "onnxruntime"
