"""Requests for the service's recorder: of real robots over a socket, and by hand."""

from pathlib import Path
from typing import Any

import numpy as np

from recap_client.images import JpegImage, encode_jpeg
from repository_factory import CHUNK, TASKS, robot_spec
from service_harness import NativeClient, act, observation
from services.common.settings import Recording
from services.policy.recorded import Served

SPEC = robot_spec()
HZ = SPEC.control_hz


def recording(folder: Path, **parts: Any) -> Recording:
    return Recording(folder, min_free=0, **parts)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.mcap"))


def drive(
    url: str, steps: int, *, episode: str = "e1", period: float = 1 / HZ, jpeg: bool = False, **parts: Any
) -> list[Any]:
    """One episode of a robot that records nothing, with a seed only where `parts` has one; its replies."""
    replies = []
    with NativeClient(url) as client:
        client.ask({"type": "reset", "robot": "r1", "episode": episode, "task": TASKS[1]})
        for step in range(steps):
            seen = observation(SPEC, seed=step, prompt=TASKS[1])
            if jpeg:
                seen["images"] = {name: JpegImage(encode_jpeg(frame)) for name, frame in seen["images"].items()}
            message = act(SPEC, step, t_obs=100 + step * period, episode=episode, observation=seen, **parts)
            replies.append(client.ask(message))
        client.ask({"type": "outcome", "robot": "r1", "episode": episode, "success": True})
    return replies


def request(key: int, *, robot: str = "r", episode: str = "e", seed: int = 0) -> Served:
    seen = observation(SPEC, seed=seed)
    return Served(key, robot, episode, "test", 1.0, None, 0, 0, 1, seen["images"], seen["state"], TASKS[0],
                  np.zeros((CHUNK, 4), np.float32), {"name": "policy"}, {})  # fmt: skip
