"""The critic as the robot sees it: how far from success is this?"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from recap_client.policy import encode_observation
from recap_client.robots.base import Observation
from recap_client.session import ProtocolError, Session
from recap_client.spec import RobotSpec
from recap_client.tracing import Tracing, process_tracing


@dataclass(frozen=True)
class Value:
    """value in [-1, 0] (0 = done); progress = 1 + value; advantage over the critic's horizon, None until it is full;
    seconds_to_success: expected; alarm: the service thinks that the episode goes wrong."""

    value: float
    progress: float
    std: float
    advantage: float | None
    seconds_to_success: float | None
    alarm: bool


class RemoteCritic:
    """The critic service at `url` (e.g. ws://127.0.0.1:8001/value) for one robot. tracing, proxy, tls_ca: as of
    `RemotePolicy`. Errors: see `Session.call`."""

    def __init__(self, url: str, spec: RobotSpec, *, robot: str = "robot", timeout_s: float = 5.0,
                 headers: Mapping[str, str] | None = None, tracing: Tracing | None = None,
                 proxy: str | None = None, tls_ca: Path | str | None = None) -> None:  # fmt: skip
        self._tracing = tracing or process_tracing("recap-client")
        self.session = Session(url, "critic", spec, timeout_s=timeout_s, headers=headers, proxy=proxy, tls_ca=tls_ca)
        self.robot = robot
        self._seq = 0
        self._episode = ""

    def reset(self, episode: str, task: str) -> None:
        """Start an episode: the critic forgets what it saw of this robot before."""
        self._episode, self._seq = episode, 0
        self.session.call({"type": "reset", "robot": self.robot, "episode": episode, "task": task})

    def observe(self, observation: Observation, prompt: str, *, act_latency_s: float | None = None,
                deadline_s: float | None = None) -> Value:  # fmt: skip
        """Judge one observation. act_latency_s: of the newest policy call, shown on the dashboard."""
        seq, self._seq = self._seq, self._seq + 1
        message = {
            "type": "observe", "seq": seq, "t_obs": observation.t, "robot": self.robot, "episode": self._episode,
            "observation": encode_observation(observation, prompt),
        }  # fmt: skip
        if act_latency_s is not None:
            message["act_latency_ms"] = act_latency_s * 1e3
        with nullcontext() if self._tracing is None else self._tracing.request(message):
            reply = self.session.call(message, deadline_s=deadline_s)
        try:
            advantage, seconds = reply.get("advantage"), reply.get("seconds_to_success")
            return Value(
                float(reply["value"]), float(reply["progress"]), float(reply.get("std", 0.0)),
                None if advantage is None else float(advantage), None if seconds is None else float(seconds),
                bool(reply.get("alarm", False)),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"{self.session.url}: expected a value reply, got {str(reply)[:200]}") from error

    def outcome(self, success: bool) -> None:
        """Tell the critic how the episode ended."""
        self.session.call({"type": "outcome", "robot": self.robot, "episode": self._episode, "success": success})

    def close(self) -> None:
        self.session.close()
