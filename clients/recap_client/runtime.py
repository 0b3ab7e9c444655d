"""One episode: the fixed-rate loop from observation to action, with takeovers, values and the log.

The same loop runs in real time on a robot and as fast as possible in simulation. Services are asked from threads; when
a reply is late the robot lives on the rest of its chunk, when that is used up it holds position, and it goes on when
the service is back.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recap_client import emergency, verdict
from recap_client.asking import ChunkSource
from recap_client.episode import Critic, EpisodeResult, LoopSettings, Policy
from recap_client.intervention import TakeoverRule, Watcher
from recap_client.pace import Caller, Pace
from recap_client.record import EpisodeInfo, Outcome, Recorder, StepRecord
from recap_client.robots.base import Observation, Robot, StepResult, Teleoperator
from recap_client.safety import SafetyLimits, UnsafeAction
from recap_client.session import ServiceError
from recap_client.value import Value

__all__ = ["Critic", "EpisodeResult", "LoopSettings", "Policy", "run_episode"]

_log = logging.getLogger(__name__)


def run_episode(robot: Robot, task: str, seed: int, *, policy: Policy | None = None, critic: Critic | None = None,
                teleoperator: Callable[[], Teleoperator] | None = None, intervention: TakeoverRule | None = None,
                recording: Path | None = None, settings: LoopSettings | None = None,
                episode: str | None = None) -> EpisodeResult:  # fmt: skip
    """Run one episode of `task` (name or prompt) from `seed` to success, time-out, Ctrl-C or a broken robot.

    Without a policy, the teleoperator demonstrates. With `intervention`, it takes over by that rule, which needs the
    critic. recording: path of the `.mcap` to write. A reset that a service refuses raises ServiceError; later failures
    of services are survived. Ctrl-C ends the episode with reason "operator" and everything recorded; an exception of
    the robot ends it with reason "error", everything recorded, and is raised again. The armed emergency stop ends it
    with reason "stopped"; pressed before the start it raises EmergencyStopped and nothing moves. `verdict.say` ends it
    with that reason and outcome.
    """
    if policy is None and teleoperator is None:
        raise ValueError("run_episode: expected a policy, a teleoperator, or both; got neither")
    if intervention is not None and (critic is None or teleoperator is None):
        raise ValueError("run_episode: intervention: expected a critic and a teleoperator with it")
    loop = _Loop(robot, task, seed, policy, critic, teleoperator, intervention, settings or LoopSettings(),
                 episode or f"{task}-{seed}")  # fmt: skip
    return loop.run(recording)


@dataclass
class _Tally:
    steps: int = 0
    starved: int = 0
    intervened: int = 0
    alarms: int = 0
    latency: list[float] = field(default_factory=list)
    values: list[tuple[int, float]] = field(default_factory=list)
    failing: bool = False


class _Loop:
    """State of one running episode."""

    def __init__(self, robot: Robot, task: str, seed: int, policy: Policy | None, critic: Critic | None,
                 teleoperator: Callable[[], Teleoperator] | None, rule: TakeoverRule | None, settings: LoopSettings,
                 episode: str) -> None:  # fmt: skip
        self.robot, self.task, self.seed, self.episode, self.settings = robot, task, seed, episode, settings
        self.policy, self.critic = policy, critic
        self.prompt = robot.prompt(task)
        self.make_human = teleoperator
        self.human: Teleoperator | None = None
        self.watcher: Watcher | None = rule.watcher(seed) if rule else None
        self.safety = SafetyLimits(robot.spec, settings.max_change)
        self.source: ChunkSource | None = None
        self.judging: Caller[Value] = Caller("value")
        self.recorder: Recorder | None = None
        self.others: dict[int, Mapping[str, str]] = {}  # chunks of another model than the recording's head names
        self.tally = _Tally()
        self.judged = -settings.execute
        self.proposed: NDArray[np.float32] | None = None
        self.deadline_s = settings.deadline_s or (0.4 if settings.realtime else None)

    def run(self, recording: Path | None) -> EpisodeResult:
        emergency.check()
        self.robot.reset(self.task, self.seed)
        if self.settings.realtime:
            self.robot.observe()  # the first frame opens cameras; that is not part of the episode
        if self.policy is not None:
            self.policy.reset(self.episode, self.prompt, self.seed)
        elif self.make_human is not None:
            self.human = self.make_human()
        if self.critic is not None:
            self.critic.reset(self.episode, self.prompt)
        if recording is not None:
            self.recorder = Recorder(recording, self._info(), image_format=self.settings.image_format,
                                     wait=not self.settings.realtime)  # fmt: skip
        self.pace = Pace(1.0 / self.robot.spec.control_hz, self.settings.realtime)
        if self.policy is not None:
            self.source = ChunkSource(self.policy, self.robot.spec, self.settings, self.pace, prompt=self.prompt,
                                      deadline_s=self.deadline_s, seed=self.seed)  # fmt: skip
        success: bool | None = None
        reason = "error"
        verdict.begin()
        try:
            result = self._steps()
            success, reason = result.success, "success" if result.success else "timeout"
        except verdict.EpisodeJudged as judged:
            success, reason = judged.verdict.success, judged.verdict.reason
            self._stop()
        except emergency.EmergencyStopped as pressed:
            reason = "stopped"
            emergency.halt(self.robot)
            _log.error("%s: step %d: %s", self.episode, self.tally.steps, pressed)
        except KeyboardInterrupt:
            reason = "operator"
            self._stop()
        except BaseException:
            self._stop()
            raise
        finally:
            if self.source is not None:
                self.source.close()
            self.judging.close()
            error = self._end(success, reason)
        return self._result(success, reason, recording, error)

    def _stop(self) -> None:
        """Nobody commands any more: hold before anything that takes time (late replies, the log)."""
        try:
            self.robot.hold()
        except Exception as error:
            _log.error("%s: the robot could not be told to hold: %s", self.episode, error)

    def _steps(self) -> StepResult:
        while True:
            step = self.tally.steps
            self.pace.wait(step)
            emergency.check()
            observation = self.robot.observe() if self._must_look(step) else None
            value = self._judge(step, observation)
            command, chunk = self._choose(step, observation)
            if command is None and self.source is not None:
                self.source.held()
            emergency.check()  # again: waiting for the services took time
            result = self._apply(command)
            self.safety.applied(result.action)
            if self.critic is not None and not self._waits_for_value():
                value = self._value(step)  # in real time never before the action
            self.tally.steps += 1
            self._note(step, observation, command, chunk, value, result)
            if command is None and not (self.source is not None and self.source.simulated):
                self.pace.idle()
            self.pace.end(step)
            verdict.check()
            if result.done:
                return result

    def _must_look(self, step: int) -> bool:
        if self.settings.realtime or (self.recorder is not None and self.settings.record_images):
            return True
        asks = self.source is not None and self.human is None and self.source.wants(step)
        return asks or self._must_judge(step) or self.recorder is not None

    def _must_judge(self, step: int) -> bool:
        return self.critic is not None and not self.judging.busy and step - self.judged >= self.settings.execute

    def _judge(self, step: int, observation: Observation | None) -> float | None:
        """Start a call to the critic when one is due, take what is there, let the operator see it."""
        critic = self.critic
        if critic is None:
            return None
        if self._must_judge(step) and observation is not None:
            seen, latency, self.judged = observation, self.tally.latency[-1:], step
            newest = latency[0] if latency else None
            self.judging.start(step, lambda: critic.observe(
                seen, self.prompt, act_latency_s=newest, deadline_s=self.deadline_s))  # fmt: skip
            # the policy can work at the same time
            self._ask(step, observation)
        return self._value(step) if self._waits_for_value() else None

    def _waits_for_value(self) -> bool:
        """Is the value needed before the action? Only by an operator who may take over."""
        return self.watcher is not None or not self.settings.realtime

    def _value(self, step: int) -> float | None:
        """The critic's answer if it is there; returned when it is of this very step, noted in any case."""
        try:
            done = self.judging.result(self.pace.patience(step))
        except ServiceError as error:
            self._service_failed("critic", error)
            return None
        if done is None:
            return None
        at, value = done
        self.tally.values.append((at, value.value))
        self.tally.alarms += int(value.alarm)
        if self.watcher and self.watcher.see(at * self.pace.period_s, value.value) and self.human is None:
            self._take_over(step)
        return value.value if at == step else None

    def _take_over(self, step: int) -> None:
        assert self.make_human is not None
        self.human = self.make_human()
        self._forget()
        _log.info("%s: the operator takes over at step %d", self.episode, step)

    def _ask(self, step: int, observation: Observation | None) -> None:
        if self.source is not None and self.human is None and self.source.wants(step):
            self.source.ask(step, self.robot.observe() if observation is None else observation)

    def _forget(self) -> None:
        if self.source is not None:
            self.source.clear()

    def _choose(self, step: int, observation: Observation | None) -> tuple[NDArray[np.float32] | None, int]:
        """The command of this step (None = hold) and the chunk it comes from."""
        self.proposed = None
        if self.human is not None:
            return self._safe(self.human.action()), -1
        self._ask(step, observation)
        try:
            chunk = self.source.take(step) if self.source is not None else None
            if chunk is not None:
                if self.recorder is not None and chunk.model not in (None, self.recorder.info.policy):
                    self.others[chunk.seq] = dict(chunk.model or {})
                self.tally.latency.append(chunk.latency_s)
                self.tally.failing = False
                self._ask(step, observation)  # after a late reply the next request may be due at once
        except ServiceError as error:
            self._service_failed("policy", error)
        due = self.source.at(step) if self.source is not None else None
        if due is None:
            self.tally.starved += 1
            return None, -1
        self.proposed = due.action
        return self._safe(due.action), due.chunk

    def _safe(self, action: NDArray[np.float32]) -> NDArray[np.float32] | None:
        try:
            return self.safety(action)
        except UnsafeAction as error:
            _log.error("%s: step %d: %s; holding position", self.episode, self.tally.steps, error)
            self._forget()
            self.tally.starved += 1
            return None

    def _apply(self, command: NDArray[np.float32] | None) -> StepResult:
        return self.robot.hold() if command is None else self.robot.act(command)

    def _note(self, step: int, observation: Observation | None, command: NDArray[np.float32] | None, chunk: int,
              value: float | None, result: StepResult) -> None:  # fmt: skip
        intervened = self.human is not None and self.policy is not None
        self.tally.intervened += intervened
        if self.recorder is None or observation is None:
            return
        applied = result.action if result.action is not None else command
        if applied is None:
            applied = np.full(len(self.robot.spec.action), np.nan, np.float32)  # a hold that the robot does not explain
        images = observation.images if self.settings.record_images else {}
        self.recorder.step(StepRecord(step, observation.t, observation.state, applied, images, self.proposed, chunk,
                                      intervened, value, self.others.get(chunk)))  # fmt: skip

    def _service_failed(self, what: str, error: ServiceError) -> None:
        if not self.tally.failing:  # once per outage, not twenty times a second
            _log.warning("%s: step %d: %s: %s", self.episode, self.tally.steps, what, error)
        self.tally.failing = True

    def _end(self, success: bool | None, reason: str) -> str | None:
        error = None
        if self.recorder is not None:
            missed = self.pace.missed + self.tally.starved
            failure = self.recorder.close(Outcome(success, self.tally.steps, reason, missed))
            error = None if failure is None else str(failure)
        for service in (self.policy, self.critic):
            if service is not None and success is not None:
                try:
                    service.outcome(success)
                except ServiceError as problem:
                    _log.warning("%s: the outcome was not delivered: %s", self.episode, problem)
        return error

    def _info(self) -> EpisodeInfo:
        return EpisodeInfo(
            self.robot.spec, self.prompt, self.task, self.seed, self.episode,
            policy=dict(self.policy.identity) if self.policy else None, demonstration=self.policy is None,
            style=self.human.style if self.human else None, clock_offset_s=self._clock_offset(),
        )  # fmt: skip

    def _clock_offset(self) -> float | None:
        try:
            return self.policy.clock_offset() if self.policy else None
        except ServiceError:
            return None  # the log does without; the episode will tell whether the service is there

    def _result(self, success: bool | None, reason: str, recording: Path | None, error: str | None) -> EpisodeResult:
        tally, switches = self.tally, self.source.switches if self.source is not None else []
        return EpisodeResult(
            self.prompt, self.task, self.seed, self.episode, success, reason, tally.steps,
            self.pace.missed + tally.starved, tally.starved, self.safety.clipped, tally.intervened,
            tuple(tally.latency), tuple(tally.values), self.human.style if self.human else None,
            str(recording) if recording else None, error, tally.alarms,
            tuple(switch.delay for switch in switches),
            tuple(switch.seam for switch in switches if switch.seam is not None),
        )  # fmt: skip
