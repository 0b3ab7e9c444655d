"""The options of `recap serve` and `recap bench`; light, for `--help` must not import a web server."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from services.common.settings import LogFormat


@dataclass(frozen=True)
class ServeArgs:
    """Serve exported models to robots."""

    what: Annotated[Literal["policy", "critic", "all"], tyro.conf.Positional]
    """Which service; `all` runs both, each in a process of its own, and forwards what the policy sees to the critic."""
    models: Path
    """Model repository, as `recap export` writes it."""
    policy_port: int = 8000
    critic_port: int = 8001
    lerobot_port: int | None = None
    """Also serve LeRobot's asynchronous inference (gRPC) here; its own server uses 8080. Needs the extra `fronts`."""
    groot_port: int | None = None
    """Also serve GR00T's protocol (ZeroMQ) here; its own server uses 5555. Needs the extra `fronts`."""
    host: str = "127.0.0.1"
    """Address to listen on. Set RECAP_API_KEY in the environment before opening it to others."""
    engine: str = "onnxruntime"
    """onnxruntime, or torch for a model exported with `--target torch`; the critic runs on onnxruntime."""
    engine_threads: int = 1
    """CPU threads of the policy's engine; more help large models, and take cores from the robot's own loop."""
    beta: float = 1.0
    """Classifier-free guidance strength; 1 = none."""
    critic_url: str | None = None
    """Where `policy` forwards observations to, e.g. ws://host:8001/value; set by itself with `all`."""
    critic_hz: float = 20.0
    """Forward at most so many observations a second and robot."""
    seed: int | None = None
    """Seed of the flow noise of sessions that send none."""
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
