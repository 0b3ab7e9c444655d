"""The options of `recap bench serve`; light, for `--help` must not import a web server."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PayloadName = Literal["state", "2x224", "3x224-jpeg", "3x480x640", "3x480x640-jpeg"]
ServerName = Literal["recap-null", "recap-tiny", "echo", "lerobot", "vlagents", "ray", "litserve"]
PeerName = Literal["all", "none", "lerobot", "vlagents", "ray", "litserve"]

OURS: tuple[ServerName, ...] = ("echo", "recap-null", "recap-tiny")
PEER_NAMES: tuple[ServerName, ...] = ("lerobot", "vlagents", "ray", "litserve")


@dataclass(frozen=True)
class ServeBenchArgs:
    """The policy service beside an echo server and other projects' servers: latency, CPU, robots held."""

    peers: tuple[PeerName, ...] = ("all",)
    """Which peers: all, none, or names. Each is installed from PyPI into an environment of its own."""
    peers_dir: Path = Path("~/.cache/recap-bench")
    """Where these environments are kept between runs; LeRobot's takes 5 GB."""
    models: Path = Path("assets/model_repository")
    """Model repository whose `policy` is the tiny engine."""
    payloads: tuple[PayloadName, ...] = ("state", "2x224", "3x224-jpeg", "3x480x640", "3x480x640-jpeg")
    rates: tuple[int, ...] = (10, 30, 50)
    """Robots' rates in Hz for the search of how many are held; none skips it."""
    rounds: int = 3
    """Every server is started, measured and stopped so many times, in turns: a slow minute of the machine hits all."""
    requests: int = 500
    """Timed requests of one robot per server, payload and round."""
    warm_up: int = 50
    block_s: float = 10.0
    """A block of requests ends after so many seconds, whatever their number."""
    probe_s: float = 2.0
    """Seconds of one try of the search; as long as it takes for 100 deadlines where that is more."""
    most_robots: int = 128
    quick: bool = False
    """A smoke test of seconds: the null engine and the echo server, few requests. Its figures mean nothing."""
    append: Path | None = None
    """Put the table into this file, below its introduction, e.g. docs/benchmarks.md."""
