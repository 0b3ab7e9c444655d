"""A policy that runs in a service: observation in, chunk of actions out."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recap_client.images import JpegImage, encode_jpeg
from recap_client.robots.base import Observation
from recap_client.rtc import Chaining
from recap_client.session import ProtocolError, Session
from recap_client.spec import RobotSpec
from recap_client.tracing import Tracing, process_tracing


@dataclass(frozen=True)
class Chunk:
    """A reply of the policy.

    actions: float32 [H, A] in the units of the spec, the first meant for the moment `t_obs` (monotonic [s]) of the
    observation; latency_s: request to reply as seen by the robot; timing: the service's own, milliseconds by stage.
    model: name, version and hash of the model that gave it; None when not told.
    """

    actions: NDArray[np.float32]
    seq: int
    t_obs: float
    latency_s: float
    timing: Mapping[str, float] = field(default_factory=dict)
    model: Mapping[str, str] | None = None


class RemotePolicy:
    """The policy service at `url` (e.g. ws://127.0.0.1:8000/act) for one robot.

    Refuses a service whose spec differs from the robot's (SpecError). jpeg_quality: send JPEG instead of raw frames
    (lossy; for thin links). forward=False: the service does not show this robot's frames to the critic, because the
    robot does it itself (`RemoteCritic`). tracing: of its requests; None = that of the process, if the environment asks
    for one (TracingError where it cannot be made). proxy, tls_ca: see `Session`. Errors of calls: see `Session.call`.
    """

    def __init__(self, url: str, spec: RobotSpec, *, robot: str = "robot", jpeg_quality: int | None = None,
                 forward: bool = True, timeout_s: float = 5.0, headers: Mapping[str, str] | None = None,
                 tracing: Tracing | None = None, proxy: str | None = None,
                 tls_ca: Path | str | None = None) -> None:  # fmt: skip
        self._tracing = tracing or process_tracing("recap-client")
        self.session = Session(url, "policy", spec, timeout_s=timeout_s, headers=headers, proxy=proxy, tls_ca=tls_ca)
        self.spec, self.robot, self.forward = spec, robot, forward
        self._jpeg_quality = jpeg_quality
        self._seq = 0
        self._episode, self._seed = "", -1

    @property
    def identity(self) -> Mapping[str, str]:
        """name, version and hash of the model that was served when the connection began."""
        return _identity(self.session.welcome.model)

    @property
    def rtc(self) -> bool:
        """Can the model that is served now continue a chunk (real-time chunking)?"""
        return self.session.welcome.details.get("rtc") is True

    def reset(self, episode: str, task: str, seed: int | None = None) -> None:
        """Start an episode. With a seed (>= 0), flow noise depends on (seed, number of the request) alone."""
        self._episode, self._seed, self._seq = episode, -1 if seed is None else seed, 0
        message = {"type": "reset", "robot": self.robot, "episode": episode, "task": task}
        self.session.call(message if self.forward else {**message, "forward": False})

    def infer(self, observation: Observation, prompt: str, *, deadline_s: float | None = None,
              chaining: Chaining | None = None) -> Chunk:  # fmt: skip
        """Ask for the actions that follow `observation`. deadline_s: seconds from now after which it is of no use.
        chaining: the chunk that is being executed, for a model that can continue it."""
        seq, self._seq = self._seq, self._seq + 1
        message = {
            "type": "act", "seq": seq, "t_obs": observation.t, "robot": self.robot, "episode": self._episode,
            "observation": encode_observation(observation, prompt, self._jpeg_quality),
        }  # fmt: skip
        if self._seed >= 0:
            message["seed"] = self._seed
        if not self.forward:
            message["forward"] = False
        if chaining is not None:
            message |= _chaining_fields(chaining)
        if deadline_s is not None:
            message["deadline_ms"] = deadline_s * 900  # the refusal must be here before we hang up
        with nullcontext() if self._tracing is None else self._tracing.request(message):
            began = time.monotonic()
            reply = self.session.call(message, deadline_s=deadline_s)
            latency = time.monotonic() - began
        actions = reply.get("actions")
        width = len(self.spec.action)
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.shape[1] != width or not len(actions):
            got = list(actions.shape) if isinstance(actions, np.ndarray) else type(actions).__name__
            raise ProtocolError(f"{self.session.url}: actions: expected a float32 array [H, {width}], got {got}")
        try:
            timing = {k: float(v) for k, v in dict(reply.get("server_timing", {})).items()}
            model = _identity(reply.get("model", self.session.welcome.model))
            return Chunk(np.asarray(actions, np.float32), seq, observation.t, latency, timing, model)
        except (AttributeError, TypeError, ValueError) as error:
            raise ProtocolError(
                f"{self.session.url}: actions, server_timing: expected numbers, and a map as model: {error}"
            ) from error

    def outcome(self, success: bool) -> None:
        """Tell the service how the episode ended."""
        self.session.call({"type": "outcome", "robot": self.robot, "episode": self._episode, "success": success})

    def clock_offset(self, rounds: int = 5) -> float:
        """Service clock minus this robot's monotonic clock [s], by the fastest of some pings."""
        best = (float("inf"), 0.0)
        for _ in range(rounds):
            began = time.monotonic()
            reply = self.session.call({"type": "ping", "t": began})
            ended = time.monotonic()
            best = min(best, (ended - began, float(reply["t_server"]) - (began + ended) / 2))
        return best[1]

    def close(self) -> None:
        self.session.close()


def _identity(model: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in model.items()}


def _chaining_fields(chaining: Chaining) -> dict[str, object]:
    fields: dict[str, object] = {}
    if chaining.previous is not None:
        fields |= {"previous": np.asarray(chaining.previous, np.float32), "delay": chaining.delay}
        if chaining.horizon is not None:
            fields["horizon"] = chaining.horizon
    if chaining.runs_out_s is not None:
        fields["runs_out_ms"] = 1000 * chaining.runs_out_s
    if chaining.switched is not None:
        fields["switched"] = {"delay": chaining.switched.delay, "seam": chaining.switched.seam}
    return fields


def encode_observation(observation: Observation, prompt: str, jpeg_quality: int | None = None) -> dict[str, object]:
    """The wire form of an observation: images, state, prompt."""
    images: dict[str, object] = dict(observation.images)
    if jpeg_quality is not None:
        images = {n: JpegImage(encode_jpeg(frame, jpeg_quality)) for n, frame in observation.images.items()}
    return {"images": images, "state": np.asarray(observation.state, np.float32), "prompt": prompt}
