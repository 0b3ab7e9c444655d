"""The policy as a source of actions: asked from a thread, its chunks laid on control steps, every switch measured."""

import logging
from dataclasses import replace

import numpy as np

from recap_client.chunks import Due, Queue, queue_for
from recap_client.delay import LateCaller
from recap_client.episode import LoopSettings, Policy
from recap_client.pace import LATEST, Caller, Pace
from recap_client.policy import Chunk
from recap_client.robots.base import Observation
from recap_client.rtc import Chaining, DelayEstimate, Switch, seam_error
from recap_client.session import ServiceError, ServiceRefused
from recap_client.spec import RobotSpec

_log = logging.getLogger(__name__)


class ChunkSource:
    """One episode of one policy. At most one request is under way; its reply is never used after a stall of the control
    clock (`pace`) that outlasted `deadline_s`. seed: of simulated delays. switches: every one so far, in order.

    Chunks are laid on the actions that have run, and not on the control steps: while a robot without an action holds
    (`held`), the scene waits for the chunk's first rows, which would otherwise be lost.
    """

    def __init__(self, policy: Policy, spec: RobotSpec, settings: LoopSettings, pace: Pace, *, prompt: str,
                 deadline_s: float | None, seed: int) -> None:  # fmt: skip
        self.policy, self.spec, self.settings, self.pace = policy, spec, settings, pace
        self.prompt, self.deadline_s = prompt, deadline_s
        self.switches: list[Switch] = []
        self._queue: Queue = queue_for(settings.chunks, settings.execute)
        self._delays = DelayEstimate(1.0 / spec.control_hz)
        self._calls = self._caller(seed)
        self._asked = self._asked_at = self._held = 0
        self._asked_lost = self._chunk_lost = 0.0
        self._unreported: Switch | None = None
        self._plain: str | None = None if settings.chunks == "rtc" else "not asked for"

    def wants(self, step: int) -> bool:
        """Is it time to ask, and free to?"""
        due = self._stale(self._chunk_lost) or self._queue.wants_chunk(self._ran(step), self._delays.expected)
        return due and not self._calls.busy

    def ask(self, step: int, observation: Observation) -> None:
        """Start a request for `observation`, which is that of control step `step`. Only when it `wants` one."""
        self._forget_stale()
        # decided here and not in the thread: the queue belongs to the control loop
        policy, options = self.policy, self._chaining(step)
        self._asked, self._asked_at, self._asked_lost = step, self._ran(step), self.pace.lost_s
        self._calls.start(step, lambda: policy.infer(observation, self.prompt, deadline_s=self.deadline_s, **options))

    def take(self, step: int) -> Chunk | None:
        """The reply that came since, if one did, already in use. Raises the ServiceError of a failed request.

        It is waited for only where that is worth a late action: when there is no other, or in a step in which replies
        usually come."""
        self._forget_stale()
        try:
            done = self._reply(step)
        except ServiceError as error:
            if isinstance(error, ServiceRefused) and error.field == "previous":
                self._switch_plainly(str(error))
            raise
        if done is None:
            return None
        at, chunk = done
        if not self._stale(self._asked_lost):
            self._chunk_lost = self._asked_lost
            self._put(step, at, chunk)
        return chunk

    def at(self, step: int) -> Due | None:
        """The action of control step `step`, None when the robot is starved."""
        return self._queue.at(self._ran(step))

    def held(self) -> None:
        """In this control step the robot holds, and no action runs."""
        self._held += 1

    @property
    def simulated(self) -> bool:
        """Is a reply held back by a simulated delay, and no service gone?"""
        return self.settings.delay is not None and self._calls.busy

    def clear(self) -> None:
        """No action of any chunk so far is to be used (a takeover, an unsafe action)."""
        self._queue.clear()

    def close(self) -> None:
        """Wait for a pending request (bounded by its deadline), drop its reply."""
        self._calls.close()

    def _ran(self, step: int) -> int:
        """Actions that have run before control step `step`, which is the current one."""
        return step - self._held

    def _caller(self, seed: int) -> Caller[Chunk] | LateCaller[Chunk]:
        caller: Caller[Chunk] = Caller("act")
        if self.settings.delay is None:
            return caller
        return LateCaller(caller, self.settings.delay, 1.0 / self.spec.control_hz, np.random.default_rng(seed),
                          lambda chunk, lag_s: replace(chunk, latency_s=lag_s))  # fmt: skip

    def _reply(self, step: int) -> tuple[int, Chunk] | None:
        worth = self.at(step) is None or step - self._asked >= self._delays.typical
        if isinstance(self._calls, LateCaller):
            return self._calls.result(step, LATEST if worth else 0.0)
        patience = self.pace.patience(step)
        return self._calls.result(patience if worth or patience is None else 0.0)

    def _put(self, step: int, asked: int, chunk: Chunk) -> None:
        old = self.at(step)
        self._queue.put(chunk.actions, self._asked_at, chunk.seq)
        new = self.at(step)
        self._delays.add(step - asked, chunk.latency_s)
        if new is not None:
            self._unreported = Switch(step - asked, self._seam(old, new))
            self.switches.append(self._unreported)

    def _seam(self, old: Due | None, new: Due) -> float | None:
        if old is None or not (np.isfinite(old.action).all() and np.isfinite(new.action).all()):
            return None
        return seam_error(old.action, new.action, self.spec)

    def _chaining(self, step: int) -> dict[str, Chaining]:
        """What a request of this step tells of the running chunk; nothing to a policy that does not ask for it."""
        able = getattr(self.policy, "rtc", None)
        if not able:
            self._switch_plainly("the model was exported without real-time chunking (`recap export --rtc`)")
        if able is None:
            return {}
        left = self._queue.rest(self._ran(step))
        previous = left if self._plain is None else None
        if previous is not None and not np.isfinite(previous).all():
            previous = None
        switched, self._unreported = self._unreported, None
        runs_out_s = (0 if left is None else len(left)) / self.spec.control_hz
        return {"chaining": Chaining(previous, self._delays.expected, self.settings.horizon, switched, runs_out_s)}

    def _switch_plainly(self, why: str) -> None:
        if self._plain is None:
            _log.warning("chunks are switched plainly, without real-time chunking: %s", why)
            self._plain = why

    def _forget_stale(self) -> None:
        if self._stale(self._chunk_lost):
            self._queue.clear()

    def _stale(self, lost_then: float) -> bool:
        """Has the clock been moved on, since that observation, by more than a reply may be late?"""
        return self.deadline_s is not None and self.pace.lost_s - lost_then > self.deadline_s
