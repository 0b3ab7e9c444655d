"""Many episodes on several robots at once: one process, robot and session each; finished ones are not repeated."""

import logging
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

from recap_client.intervention import TakeoverRule
from recap_client.policy import RemotePolicy
from recap_client.record import RecordError
from recap_client.robots.base import RobotError
from recap_client.robots.registry import open_robot, teleoperator_of
from recap_client.rollout import read_rollout
from recap_client.runtime import EpisodeResult, LoopSettings, Policy, run_episode
from recap_client.session import ProtocolError, ServiceError, ServiceUnavailable
from recap_client.spec import RobotSpec, SpecError
from recap_client.value import RemoteCritic

ATTEMPTS = 3
OUTAGE_S = 30.0
_FINAL = ("operator", "stopped", "failure", "discarded")
"""Reasons that an operator has given, starved or not."""

_log = logging.getLogger(__name__)


class FleetError(RuntimeError):
    """Episodes could not be run: a worker process died, or a service stayed away."""


@dataclass(frozen=True)
class Job:
    """One episode: task (name or prompt) and seed."""

    task: str
    seed: int

    @property
    def name(self) -> str:
        """Its name: of the episode, and of its file."""
        return f"{self.task.replace(' ', '-')}-{self.seed:06d}"


@dataclass(frozen=True)
class FleetSettings:
    """What all episodes have in common.

    policy_url: None = demonstrations by the robot's teleoperator in `style`. local: instead of a service, a policy in
    the worker's own process: "package.module:Class" and what it is made with beside the robot's spec.
    value_url: critic; with `takeover`, the operator (style `clean`) takes over by that rule. record: folder of the
    `.mcap` files, None = none. tls_ca, proxy: of the connections to the services, see `Session`.
    """

    robot: str = "metaworld"
    robot_options: Mapping[str, Any] = field(default_factory=dict)
    policy_url: str | None = None
    value_url: str | None = None
    style: str = "mixed"
    takeover: TakeoverRule | None = None
    record: Path | None = None
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(realtime=False))
    headers: Mapping[str, str] = field(default_factory=dict)
    local: tuple[str, Mapping[str, Any]] | None = None
    tls_ca: Path | None = None
    proxy: str | None = None

    def __post_init__(self) -> None:
        if self.policy_url and self.local:
            raise FleetError("policy: expected a service (policy_url) or a policy in the process (local), got both")
        if self.takeover is not None and (self.value_url is None or not (self.policy_url or self.local)):
            raise FleetError("takeover: expected a policy and a critic (policy_url and value_url) with it")


def jobs_for(tasks: Sequence[str], episodes_per_task: int, first_seed: int) -> list[Job]:
    """The same seeds for every task, tasks taking turns, so that an early stop leaves a balanced set."""
    return [Job(task, first_seed + n) for n in range(episodes_per_task) for task in tasks]


def run_fleet(jobs: Sequence[Job], settings: FleetSettings, *, workers: int = 1,
              on_result: Callable[[EpisodeResult, bool], None] | None = None) -> list[EpisodeResult]:  # fmt: skip
    """Run all jobs; results in the order of `jobs`. on_result(result, resumed) is called as each is known.

    A job whose recording is already complete is read back, not run (`resumed`). workers=1 runs in this process. An
    episode starved of actions in fast mode says nothing about the policy: it is repeated, and after three times that
    is a FleetError. Ctrl-C ends the running episodes, recorded, and raises KeyboardInterrupt.
    """
    tell = on_result or (lambda *_: None)
    results: dict[int, EpisodeResult] = {}
    todo = []
    for index, job in enumerate(jobs):
        done = _recorded(job, settings)
        if done is None:
            todo.append(index)
        else:
            results[index] = done
            tell(done, True)
    if workers <= 1 or len(todo) <= 1:
        _run_here([jobs[i] for i in todo], todo, settings, results, tell)
    else:
        _run_apart([jobs[i] for i in todo], todo, settings, min(workers, len(todo)), results, tell)
    return [results[index] for index in range(len(jobs))]


class Worker:
    """A robot with its sessions, running one job after the other. number: tells robots of one fleet apart."""

    def __init__(self, settings: FleetSettings, number: int = 0) -> None:
        self.settings = settings
        self.robot = open_robot(settings.robot, settings.robot_options)
        spec, name = self.robot.spec, f"{settings.robot.rpartition(':')[2]}-{number}"
        link: dict[str, Any] = {"headers": settings.headers, "tls_ca": settings.tls_ca, "proxy": settings.proxy}
        self.policy: Policy | None = None
        self.critic: RemoteCritic | None = None
        if settings.local:
            self.policy = _local_policy(spec, *settings.local)
        if settings.policy_url:
            own_critic = settings.value_url is not None
            self.policy = RemotePolicy(settings.policy_url, spec, robot=name, forward=not own_critic, **link)
        if settings.value_url:
            self.critic = RemoteCritic(settings.value_url, spec, robot=name, **link)

    def run(self, job: Job) -> EpisodeResult:
        """Run a job, again if a service was away meanwhile. Raises FleetError after three such attempts."""
        problem = ""
        for attempt in range(ATTEMPTS):
            try:
                result = self._once(job)
            except ServiceError as error:
                problem = str(error)
            else:
                loop = self.settings.loop
                if loop.realtime or loop.delay or not result.starved or result.reason in _FINAL:
                    return _set_aside(result)
                problem = f"no action for {result.starved} of {result.steps} control steps"
                if result.recording:
                    Path(result.recording).unlink(missing_ok=True)
            _log.warning("%s: attempt %d of %d: %s", job.name, attempt + 1, ATTEMPTS, problem)
            self._await_services()
        raise FleetError(f"{job.name}: {ATTEMPTS} attempts failed: {problem}; is the policy service well?")

    def close(self) -> None:
        for part in (self.policy, self.critic, self.robot):
            if part is not None and hasattr(part, "close"):
                part.close()

    def _once(self, job: Job) -> EpisodeResult:
        settings = self.settings
        wanted = self.policy is None or settings.takeover is not None
        style = settings.style if self.policy is None else "clean"
        return run_episode(
            self.robot, job.task, job.seed, policy=self.policy, critic=self.critic,
            teleoperator=teleoperator_of(self.robot, job.seed, style) if wanted else None,
            intervention=settings.takeover, recording=_path(job, settings), settings=settings.loop, episode=job.name,
        )  # fmt: skip

    def _await_services(self) -> None:
        until = time.monotonic() + OUTAGE_S
        services = (part for part in (self.policy, self.critic) if isinstance(part, RemotePolicy | RemoteCritic))
        for service in services:
            while not service.session.connected:
                if time.monotonic() > until:
                    raise FleetError(f"{service.session.url}: no connection for {OUTAGE_S:.0f} s; start the service "
                                     "and run the same command again: finished recordings are kept")  # fmt: skip
                time.sleep(0.05)


def _local_policy(spec: RobotSpec, target: str, options: Mapping[str, Any]) -> Policy:
    module, _, attribute = target.partition(":")
    try:
        factory = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise FleetError(f"policy {target!r}: expected package.module:Class, cannot import it: {error}") from error
    return cast(Policy, factory(spec, **options))


def _path(job: Job, settings: FleetSettings) -> Path | None:
    return settings.record / f"{job.name}.mcap" if settings.record else None


def _set_aside(result: EpisodeResult) -> EpisodeResult:
    """A recording that the operator has discarded is kept under another name: neither a later run nor `recap ingest`
    takes it for an episode."""
    if result.reason != "discarded" or result.recording is None or not Path(result.recording).exists():
        return result
    aside = Path(result.recording).replace(result.recording + ".discarded")
    return replace(result, recording=str(aside))


def _recorded(job: Job, settings: FleetSettings) -> EpisodeResult | None:
    """The result of an episode that an earlier run finished, read from its recording."""
    path = _path(job, settings)
    if path is None or not path.exists():
        return None
    rollout = read_rollout(path, images=False)
    if rollout.success is None:  # stopped by Ctrl-C: kept, but not in the way of the whole episode
        path.replace(path.with_name(path.name + ".interrupted"))
        return None
    known = np.flatnonzero(~np.isnan(rollout.value))
    return EpisodeResult(
        rollout.task, rollout.task_name, rollout.seed, rollout.episode, rollout.success, rollout.reason, rollout.steps,
        rollout.missed_deadlines, 0, 0, int(rollout.intervention.sum()), (),
        tuple((int(step), float(rollout.value[step])) for step in known), rollout.style, str(path),
    )  # fmt: skip


def _run_here(jobs: Sequence[Job], indices: Sequence[int], settings: FleetSettings, results: dict[int, EpisodeResult],
              on_result: Callable[[EpisodeResult, bool], None]) -> None:  # fmt: skip
    if not jobs:
        return
    worker = Worker(settings)
    try:
        for index, job in zip(indices, jobs):  # noqa: B905
            result = worker.run(job)
            if result.reason == "operator":
                raise KeyboardInterrupt
            results[index] = result
            on_result(result, False)
    finally:
        worker.close()


_worker: Worker | Exception | None = None
"""Of a worker process: what runs its jobs, or why it could not be opened."""

_TRAVELS = (FleetError, RobotError, RecordError, SpecError, ServiceUnavailable, ProtocolError)
"""Exceptions that survive the way between processes as themselves."""


def _start_worker(settings: FleetSettings, counter: Any) -> None:
    global _worker
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    try:
        _worker = Worker(settings, number)
    except Exception as error:  # told by the first job: an exception here would only say that a process died
        _worker = error


def _run_job(job: Job) -> EpisodeResult:
    try:
        if isinstance(_worker, Exception):
            raise _worker
        assert _worker is not None
        return _worker.run(job)
    except _TRAVELS:
        raise
    except Exception as error:
        raise FleetError(f"{job.name}: {type(error).__name__}: {error}") from error


def _run_apart(jobs: Sequence[Job], indices: Sequence[int], settings: FleetSettings, workers: int,
               results: dict[int, EpisodeResult],
               on_result: Callable[[EpisodeResult, bool], None]) -> None:  # fmt: skip
    context = multiprocessing.get_context("spawn")  # neither GL contexts nor sockets survive a fork
    pool = ProcessPoolExecutor(workers, context, _start_worker, (settings, context.Value("i", 0)))
    try:
        pending = {pool.submit(_run_job, job): index for index, job in zip(indices, jobs)}  # noqa: B905
        for future in as_completed(pending):
            result = future.result()
            if result.reason == "operator":
                raise KeyboardInterrupt
            results[pending[future]] = result
            on_result(result, False)
    except BrokenProcessPool as error:
        raise FleetError(
            f"a worker process died after {len(results)} of {len(jobs)} episodes (killed, or out of memory?); "
            "run the same command again: finished recordings are kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
