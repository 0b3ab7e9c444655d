"""A robot, the real loop and the real service around a fault, and the four laws that hold after each of them.

The service's answers say which observation they answer: entry 0 of every action is the control step of the observation
(as a part of `LIMIT`), entry 1 the row of the chunk and entry 2 the episode (both in hundredths). So the rollout log
shows whether an executed action was a stale one.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recap_client.policy import RemotePolicy
from recap_client.record import Rollout, read_rollout
from recap_client.robots.base import Observation, StepResult
from recap_client.runtime import EpisodeResult, LoopSettings, run_episode
from recap_client.value import RemoteCritic
from repository_factory import CHUNK, TASKS, robot_spec
from service_harness import Served, SpyEngine, policy_server

SPEC = robot_spec()
DEADLINE_S = 0.4
LIMIT = 4000
"""Control steps after which a robot gives up waiting for its service: minutes, only to end a test that hangs."""


def mark(engine: SpyEngine) -> None:
    """Let the engine's actions say what they answer (see above)."""

    def edit(outputs: dict[str, Any]) -> dict[str, Any]:
        state = engine.calls[-1]["state"]
        engine.calls.clear()
        actions = np.zeros_like(outputs["actions"])
        actions[:, :, 0], actions[:, :, 2] = state[:, :1], state[:, 1:2]
        actions[:, :, 1] = np.arange(CHUNK) / 100
        return {**outputs, "actions": actions}

    engine.edit = edit


@contextmanager
def marked_service(models: Path, **settings: Any) -> Iterator[Served]:
    """A real policy service in this process, its answers marked."""
    with policy_server(models, **settings) as served:
        mark(served.engine)
        yield served


class WatchedRobot:
    """Its state is the step and the episode; `log` lists what was commanded: the action, or None for a hold.

    script: called before every observation with this robot; True ends the episode.
    """

    def __init__(self, script: Callable[["WatchedRobot"], bool]) -> None:
        self.spec = SPEC
        self.script = script
        self.log: list[np.ndarray | None] = []
        self.times: list[float] = []
        self.episode = 0
        self.over = False

    def prompt(self, task: str) -> str:
        return task

    def reset(self, task: str, seed: int) -> None:  # noqa: ARG002
        self.episode, self.log, self.times, self.over = seed, [], [], False

    def observe(self) -> Observation:
        self.over = self.over or self.script(self)
        step = len(self.log)
        image = np.full((16, 16, 3), step % 256, np.uint8)
        state = np.array([step / LIMIT, self.episode / 100, 0, 0], np.float32)
        seen = Observation({camera.name: image for camera in self.spec.cameras}, state, time.monotonic())
        self.times[step:] = [seen.t]
        return seen

    def act(self, action: np.ndarray) -> StepResult:
        return self._done(np.array(action))

    def hold(self) -> StepResult:
        return self._done(None)

    def close(self) -> None:
        pass

    def held(self, since: int = 0) -> int:
        return sum(entry is None for entry in self.log[since:])

    def acted(self) -> int:
        """Actions at the end of the log without a hold among them."""
        return next((n for n, entry in enumerate(reversed(self.log)) if entry is None), len(self.log))

    def _done(self, action: np.ndarray | None) -> StepResult:
        self.log.append(action)
        done = self.over or len(self.log) >= LIMIT
        return StepResult(done, self.over if done else None, np.zeros(4, np.float32) if action is None else action)


@dataclass
class Outage:
    """A robot's script: after `before` actions in a row the fault begins, after `held` held steps (`steps` steps
    where it need not be held) and `seconds` it ends, after `after` further actions in a row, and `extra`,
    all is well. acted: actions so far."""

    begin: Callable[[], object]
    end: Callable[[], object]
    before: int = 6
    held: int = 4
    steps: int = 0
    seconds: float = 0.0
    after: int = 10
    phase: str = "before"
    acted: int = 0
    _step: int = 0
    _since: float = 0.0
    extra: Callable[[], bool] = field(default=lambda: True)

    def __call__(self, robot: WatchedRobot) -> bool:
        self.acted = len(robot.log) - robot.held()
        if self.phase == "before" and robot.acted() >= self.before:
            self._step, self._since, self.phase = len(robot.log), time.monotonic(), "during"
            self.begin()
        elif self.phase == "during" and self._is_felt(robot):
            self._step, self.phase = len(robot.log), "after"
            self.end()
        elif self.phase == "after" and len(robot.log) - self._step >= self.after and robot.acted() >= self.after:
            self.phase = "over" if self.extra() else "after"
        return self.phase == "over"

    def _is_felt(self, robot: WatchedRobot) -> bool:
        steps = len(robot.log) - self._step
        felt = robot.held(self._step) >= self.held and steps >= self.steps
        return felt and time.monotonic() - self._since >= self.seconds


@dataclass(frozen=True)
class Driven:
    robot: WatchedRobot
    result: EpisodeResult
    rollout: Rollout
    reconnects: int
    deadline_s: float


def drive(
    url: str,
    script: Outage,
    recording: Path,
    *,
    critic_url: str | None = None,
    deadline_s: float = DEADLINE_S,
    episode: int = 3,
) -> Driven:
    """One episode of the real client in real time, through whatever `script` does to it; the four laws are checked.

    deadline_s: of a request; a long one where a busy machine must not look like a fault.
    """
    robot = WatchedRobot(script)
    policy = RemotePolicy(url, SPEC)
    critic = RemoteCritic(critic_url, SPEC) if critic_url else None
    try:
        result = run_episode(robot, TASKS[0], episode, policy=policy, critic=critic, recording=recording,
                             settings=LoopSettings(execute=4, deadline_s=deadline_s))  # fmt: skip
    finally:
        policy.close()
        if critic is not None:
            critic.close()
    driven = Driven(robot, result, read_rollout(recording), policy.session.reconnects, deadline_s)
    check_held(driven)
    check_resumed(driven, script)
    check_fresh(driven)
    check_recorded(driven)
    return driven


def check_held(driven: Driven) -> None:
    """While starved the robot was told to hold, and nothing else: no action without a chunk of the policy."""
    told = np.array([entry is not None for entry in driven.robot.log])
    np.testing.assert_array_equal(told, driven.rollout.chunk >= 0)
    assert np.isnan(driven.rollout.proposed[~told]).all() and (driven.rollout.action[~told] == 0).all()
    assert driven.result.starved == (~told).sum()


def check_resumed(driven: Driven, script: Outage) -> None:
    """Chunks flow again, in the same episode and the same client."""
    assert script.phase == "over", f"still {script.phase} the fault after {len(driven.robot.log)} steps"
    assert driven.result.success


def check_fresh(driven: Driven) -> None:
    """Every executed action is the row of its turn, of a chunk that answers an observation of this episode: as many
    actions have run since that observation as there are rows before it."""
    rollout = driven.rollout
    steps = np.flatnonzero(rollout.chunk >= 0)
    marks = rollout.proposed[steps]
    seen, row = np.rint(marks[:, 0] * LIMIT).astype(int), np.rint(marks[:, 1] * 100).astype(int)
    ran = np.concatenate([[0], np.cumsum(rollout.chunk >= 0)])
    np.testing.assert_array_equal(row, ran[steps] - ran[seen], "an action was executed out of its turn")
    assert (np.rint(marks[:, 2] * 100) == driven.robot.episode).all(), "an action of another episode was executed"
    age = rollout.t[steps] - rollout.t[seen]
    allowed = CHUNK / SPEC.control_hz + driven.deadline_s + 1.0  # the last: how late this machine may wake the loop
    assert age.max() <= allowed, f"an action answers what was seen {age.max():.2f} s before, allowed {allowed:.2f} s"
    np.testing.assert_array_equal(rollout.action[steps], marks)


def check_recorded(driven: Driven) -> None:
    """The rollout log has every control step, with its frames and what the robot was told."""
    rollout, robot = driven.rollout, driven.robot
    assert rollout.complete and rollout.dropped == 0 and driven.result.record_error is None
    assert rollout.steps == driven.result.steps == len(robot.log)
    np.testing.assert_allclose(rollout.t, robot.times[: rollout.steps])
    for frames in rollout.images.values():
        np.testing.assert_array_equal(frames[:, 0, 0, 0], np.arange(rollout.steps) % 256)
    assert set(rollout.images) == set(SPEC.camera_names)


class ChildService:
    """A marked policy service in a process of its own that can be killed and started again on its port.

    A parent imports everything once and forks a server when told to: a restart costs no imports.
    """

    def __init__(self, models: Path, port: int) -> None:
        self.port = port
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "fault_world", str(models), str(port)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )  # fmt: skip

    def __enter__(self) -> "ChildService":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.communicate("end\n", timeout=20)

    def start(self) -> None:
        """Returns when it answers."""
        self._tell("start", "ready")

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._tell("kill", "killed")

    def start_later(self) -> None:
        """Start while the caller goes on."""
        threading.Thread(target=self.start, daemon=True).start()

    def _tell(self, command: str, answer: str) -> None:
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(command + "\n")
        self._parent.stdin.flush()
        said = self._parent.stdout.readline()
        if said != answer + "\n":
            raise AssertionError(f"the service's parent: expected {answer!r}, got {said!r}")


def _parent(models: Path, port: int) -> None:
    child = 0
    for line in sys.stdin:
        if line == "start\n":
            child = os.fork() or _serve(models, port)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if line == "end\n":
                return
            print("killed", flush=True)


def _serve(models: Path, port: int) -> int:
    parent = os.getppid()
    with marked_service(models, port=port):
        print("ready", flush=True)
        while os.getppid() == parent:
            time.sleep(0.1)
    os._exit(0)


if __name__ == "__main__":
    _parent(Path(sys.argv[1]), int(sys.argv[2]))
