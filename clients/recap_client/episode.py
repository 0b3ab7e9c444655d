"""What goes into an episode and what comes out: the services it needs, its settings, its result."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from recap_client.chunks import Strategy
from recap_client.delay import Delay
from recap_client.policy import Chunk
from recap_client.robots.base import Observation
from recap_client.safety import MaxChange
from recap_client.value import Value


class Policy(Protocol):
    """What the loop needs of a policy; `RemotePolicy` is one.

    One that takes part in real-time chunking has an attribute `rtc` as well (can its model do it?) and takes
    `chaining: Chaining | None` in `infer`.
    """

    @property
    def identity(self) -> Mapping[str, str]: ...
    def reset(self, episode: str, task: str, seed: int | None = None) -> None: ...
    def infer(self, observation: Observation, prompt: str, *, deadline_s: float | None = None) -> Chunk: ...
    def outcome(self, success: bool) -> None: ...
    def clock_offset(self) -> float: ...


class Critic(Protocol):
    """What the loop needs of a critic; `RemoteCritic` is one."""

    def reset(self, episode: str, task: str) -> None: ...
    def observe(self, observation: Observation, prompt: str, *, act_latency_s: float | None = None,
                deadline_s: float | None = None) -> Value: ...  # fmt: skip
    def outcome(self, success: bool) -> None: ...


@dataclass(frozen=True)
class LoopSettings:
    """execute: actions of a chunk before asking again. realtime: keep the control rate, else as fast as possible.
    chunks: how one chunk follows another: `switch` (the newest replaces the old one), `latest` (the same, asking
    whenever it can), `ensemble` (mean of the chunks that overlap), `rtc` (the service continues the old chunk; a model
    without it is served by `switch`). horizon: of `rtc`, rows of the old chunk that the new one is held to, None =
    those that will have run when it comes.
    delay: only with realtime=False: replies are held back by control steps, as by a slow network.
    deadline_s: after which a reply is of no use (None: 0.4 s in real time, the session's timeout else).
    record_images: False records no frames, and renders only what is asked for. max_change: see `SafetyLimits`.
    image_format: see `Recorder`."""

    execute: int = 4
    realtime: bool = True
    deadline_s: float | None = None
    record_images: bool = True
    max_change: MaxChange | None = None
    image_format: str = "png"
    chunks: Strategy = "switch"
    horizon: int | None = None
    delay: Delay | None = None

    def __post_init__(self) -> None:
        if self.delay is not None and self.realtime:
            raise ValueError("delay: expected realtime=False with a simulated delay, got realtime=True")


@dataclass(frozen=True)
class EpisodeResult:
    """What one episode came to.

    success None = not known (stopped by the operator). steps: control steps, each 1 / control_hz of robot time.
    missed_deadlines: steps whose action came late or (starved) not at all. act_latency_s: one per reply.
    values: (step, value) pairs. intervened: steps under the operator. recording: its path; record_error: why it is not
    whole. alarms: values that came with an alarm. delays: control steps from observation to first action, one per chunk
    that came into use; seams: `seam_error` at each switch from one chunk to the next.
    """

    task: str
    task_name: str
    seed: int
    episode: str
    success: bool | None
    reason: str
    steps: int
    missed_deadlines: int
    starved: int
    clipped: int
    intervened: int
    act_latency_s: tuple[float, ...] = ()
    values: tuple[tuple[int, float], ...] = ()
    style: str | None = None
    recording: str | None = None
    record_error: str | None = None
    alarms: int = 0
    delays: tuple[int, ...] = ()
    seams: tuple[float, ...] = ()
