"""What the critic remembers of every robot: the episode's values, and how the last episodes ended."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from recap_model.spec import CriticSpec
from services.common.settings import CriticSettings
from services.critic.alarms import AlarmRule

_HISTORY = 1024
_OUTCOMES = 40
_UNKNOWN_TASK_STALL_S = 5.0


@dataclass
class Track:
    """One robot and its current episode. `points` are (control step, value), oldest first."""

    robot: str
    episode: str
    task: str
    rule: AlarmRule
    points: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    first_t: float | None = None
    success: bool | None = None
    finished: bool = False
    latency_ms: float | None = None
    outcomes: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_OUTCOMES))


@dataclass(frozen=True)
class Judgement:
    """What one value means. progress = 1 + value. advantage and seconds_to_success are None when not known."""

    step: float
    value: float
    advantage: float | None
    seconds_to_success: float | None
    alarm: str | None
    raised: bool

    @property
    def progress(self) -> float:
        return 1.0 + self.value


class Episodes:
    """All robots; the one unseen for longest is forgotten beyond `settings.max_robots`."""

    def __init__(self, spec: CriticSpec, settings: CriticSettings) -> None:
        self._spec, self._settings = spec, settings
        self._tracks: OrderedDict[str, Track] = OrderedDict()
        self._frames = settings.advantage_frames or max(1, round(spec.robot.control_hz))

    @property
    def tracks(self) -> list[Track]:
        return list(self._tracks.values())

    def begin(self, robot: str, episode: str, task: str) -> tuple[Track, list[str]]:
        """Start an episode; returns its track and the robots forgotten to make room."""
        t_max = self._spec.t_max.get(task.strip())
        hz = self._spec.robot.control_hz
        stall = _UNKNOWN_TASK_STALL_S * hz if t_max is None else self._settings.stall * t_max
        old = self._tracks.pop(robot, None)
        track = Track(robot, episode, task, AlarmRule(self._settings.fall, stall))
        if old is not None:
            track.outcomes, track.latency_ms = old.outcomes, old.latency_ms
        self._tracks[robot] = track
        forgotten = []
        while len(self._tracks) > self._settings.max_robots:
            forgotten.append(self._tracks.popitem(last=False)[0])
        return track, forgotten

    def track(self, robot: str, episode: str) -> Track | None:
        """The robot's track if it is in this episode."""
        track = self._tracks.get(robot)
        return track if track is not None and track.episode == episode else None

    def add(self, track: Track, value: float, t_obs: float | None) -> Judgement:
        """Take in the newest value of an episode. t_obs: the robot's monotonic clock in seconds; None counts steps."""
        if self._tracks.get(track.robot) is track:
            self._tracks.move_to_end(track.robot)
        if t_obs is None:
            step = track.points[-1][0] + 1 if track.points else 0.0
        else:
            track.first_t = t_obs if track.first_t is None else track.first_t
            step = max((t_obs - track.first_t) * self._spec.robot.control_hz, 0.0)
        raised = track.rule.update(step, value)
        t_max = self._spec.t_max.get(track.task.strip())
        advantage = None if t_max is None else self._advantage(track, step, value, t_max)
        track.points.append((step, value))
        seconds = None if t_max is None else -value * t_max / self._spec.robot.control_hz
        return Judgement(step, value, advantage, seconds, track.rule.reason, raised)

    def end(self, robot: str, episode: str, success: bool | None) -> Track | None:
        """Note how an episode ended; None when this robot is not known or is in another episode."""
        track = self.track(robot, episode)
        if track is None or track.finished:
            return None
        track.success, track.finished = success, True
        steps = track.points[-1][0] if track.points else 0.0
        track.outcomes.append({"episode": episode, "success": success, "steps": round(steps)})
        return track

    def _advantage(self, track: Track, step: float, value: float, t_max: float) -> float | None:
        """sum of rewards + V now - V then, over at least N control steps: each step cost 1/t_max."""
        then = next((point for point in reversed(track.points) if step - point[0] >= self._frames - 1e-6), None)
        return None if then is None else value - then[1] - (step - then[0]) / t_max
