"""Many sessions, one engine. A thread owns the engine and takes what waits when the engine is free: a lone request is
never delayed to wait for company, and under load requests of different robots share a run. Who is next, and what
cannot be in time: `services.common.schedule`."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from services.common import tracing
from services.common.engine import Arrays, Engine, TimedEngine
from services.common.errors import Fault, ServiceError
from services.common.logs import get_logger
from services.common.schedule import RunTimes, Turn, expected_end, make_turn, next_run

if TYPE_CHECKING:
    from services.common.spans import RequestTrace

_TROUBLE_S = 10.0

Refused = Literal["arrival", "queue"]
"""When it was seen that a deadline cannot be met: as the request came, or as a batch was formed."""

log = get_logger("batcher")


@dataclass(frozen=True)
class Answer:
    """Outputs of one sample (no batch dimension), and how it got them: seconds waited and run, samples in its batch."""

    outputs: dict[str, NDArray[Any]]
    queue_s: float
    infer_s: float
    batch: int


@dataclass(eq=False, slots=True)
class _Item:
    inputs: Arrays
    future: asyncio.Future[Answer]
    submitted: float
    turn: Turn
    trace: "RequestTrace | None" = None


class Batcher:
    """Runs samples through an engine on a thread of its own. Made and used on one event loop.

    on_batch: told the samples of every run. on_busy: told the seconds that the engine spent on it. Both from the
    engine's thread. on_refused: told of every request that is refused because its deadline cannot be met.
    times: how long runs take.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_batch: Callable[[int], None] = lambda _: None,
        on_busy: Callable[[float], None] = lambda _: None,
        on_refused: Callable[[Refused], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._timed = engine if isinstance(engine, TimedEngine) else None  # asked once: it takes microseconds
        self._on_batch, self._on_busy, self._on_refused = on_batch, on_busy, on_refused
        self.times = RunTimes(engine.batch_sizes)
        self.times.start(engine.run_times, time.perf_counter())
        self._free_at = 0.0  # when the run under way is expected to end
        self._waiting: dict[Hashable, _Item] = {}  # in order of arrival
        self._lock = threading.Lock()
        self._bell = threading.Lock()  # free when there is something to look at; a Condition costs twice as much
        self._bell.acquire()
        self._closed = False
        self.last_error: str | None = None
        self.failed_at = 0.0
        self._thread = threading.Thread(target=self._work, name=f"engine-{engine.name}", daemon=True)
        self._thread.start()

    async def run(
        self, key: Hashable, inputs: Arrays, *, deadline_s: float | None = None, runs_out_s: float | None = None
    ) -> Answer:
        """The engine's answer for one sample (arrays without batch dimension).

        key: whose request this is. A newer request of the same key takes the place of one that still waits, whose
        caller gets ServiceError `superseded`. deadline_s: seconds from now; the caller gets `deadline` as soon as it is
        clear that it cannot be met (by the run times measured so far), and at the latest when it passes, whether the
        sample waits or runs. runs_out_s: seconds from now until the robot has nothing left to do (finite; <= 0 = it
        stands still): who runs out first goes first. An exception of the engine becomes `internal`.
        """
        loop = asyncio.get_running_loop()
        now = time.perf_counter()
        with self._lock:
            if self._closed:
                raise _closing()
            older = self._waiting.get(key)
            replaced = None if older is None else older.turn
            turn = make_turn(now, deadline_s=deadline_s, runs_out_s=runs_out_s, replaced=replaced)
            if deadline_s is not None:
                self._admit(turn, older, now, deadline_s)
            item = _Item(inputs, loop.create_future(), now, turn, tracing.current())
            self._waiting[key] = item  # a dict keeps the place
            self._ring()
        if older is not None:
            _fail(older, ServiceError("superseded", "a newer observation of this session has taken its place"))
        timer = None if deadline_s is None else loop.call_later(max(deadline_s, 0.0), _expire, item, deadline_s)
        try:
            return await item.future
        finally:
            if timer is not None:
                timer.cancel()
            if self._waiting.get(key) is item:  # after a deadline or a cancellation
                self._forget(key, item)

    @property
    def depth(self) -> int:
        """Samples waiting now."""
        return len(self._waiting)

    def close(self) -> None:
        """Answer everything that waits with `shutting_down`, let the running batch end, stop the thread."""
        with self._lock:
            self._closed = True
            left = list(self._waiting.values())
            self._waiting.clear()
            self._ring()
        for item in left:
            _fail(item, _closing())
        self._thread.join(timeout=1.0)  # one that hangs in the engine dies with the process

    @property
    def trouble(self) -> str | None:
        """The last run's failure, for ten seconds: then a new request may try, or a pod taken out of service would
        never come back."""
        return self.last_error if time.monotonic() - self.failed_at < _TROUBLE_S else None

    def _admit(self, turn: Turn, older: _Item | None, now: float, deadline_s: float) -> None:
        others = [item.turn for item in self._waiting.values() if item is not older]
        expected_s = expected_end(turn, others, self.times, now, self._free_at) - now
        if expected_s > deadline_s:
            self._on_refused("arrival")
            raise _hopeless(expected_s, deadline_s)

    def _forget(self, key: Hashable, item: _Item) -> None:
        with self._lock:
            if self._waiting.get(key) is item:
                del self._waiting[key]

    def _ring(self) -> None:
        """Let the thread look. Called under the lock: the bell must not be released twice."""
        if self._bell.locked():
            self._bell.release()

    def _take(self) -> list[_Item] | None:
        """Block until something is to be run; None when closed."""
        while True:
            with self._lock:
                while self._waiting and not self._closed:
                    if items := self._next():
                        return items
                if self._closed:
                    return None
            self._bell.acquire()

    def _next(self) -> list[_Item]:
        now = time.perf_counter()
        waiting = list(self._waiting.items())
        run = next_run([item.turn for _, item in waiting], self.times, now)
        taken = [waiting[i][1] for i in run.chosen]
        refused = [(waiting[i][1], ends) for i, ends in run.refused]
        for i in (*run.chosen, *(i for i, _ in run.refused)):
            del self._waiting[waiting[i][0]]
        if taken:
            self._free_at = run.ends
            for item in self._waiting.values():
                item.turn.passed += 1
        for item, ends in refused:
            _post([item], self._refuse, item, ends)
        return taken

    def _refuse(self, item: _Item, ends: float) -> None:
        if not item.future.done():
            self._on_refused("queue")
            _fail(item, _hopeless(ends - item.submitted, item.turn.deadline - item.submitted))

    def _run(self, items: list[_Item], now: float) -> dict[str, NDArray[Any]]:
        inputs = _stack([item.inputs for item in items])
        if self._timed is None:
            return self._engine.run(inputs)
        last = max(item.turn.deadline for item in items)
        return self._timed.run_within(inputs, None if last == math.inf else last - now)

    def _work(self) -> None:
        while (items := self._take()) is not None:
            start = time.perf_counter()
            try:
                with tracing.engine_run([(item.trace, item.submitted) for item in items], start):
                    outputs = self._run(items, start)
            except ServiceError as error:  # of an engine elsewhere: typed, and told as it is
                if error.fault.code != "deadline":
                    if self.last_error is None:  # said once: robots ask many times a second while it is away
                        log.warning("no answer of the engine", engine=self._engine.name, **error.fault.to_message())
                    self.last_error, self.failed_at = error.fault.message, time.monotonic()
                _post(items, _fail_each, items, error.fault)
                continue
            except Exception as error:  # whatever an engine raises must not end the thread that serves every robot
                self.last_error = f"{type(error).__name__}: {error}"
                self.failed_at = time.monotonic()
                log.error("the engine failed", engine=self._engine.name, batch=len(items), exc_info=error)
                _post(items, _fail_all, items, self.last_error)
                continue
            self.last_error = None
            end = time.perf_counter()
            answers = [
                Answer(
                    {name: array[i] for name, array in outputs.items()}, start - item.submitted, end - start, len(items)
                )
                for i, item in enumerate(items)
            ]
            self._on_batch(len(items))
            self._on_busy(end - start)
            _post(items, _resolve_all, items, answers)
            with self._lock:  # while the answers are on their way
                self.times.record(len(items), end - start, end)


def _stack(samples: list[Arrays]) -> dict[str, NDArray[Any]]:
    if len(samples) == 1:  # the common case needs no copy
        return {name: array[None] for name, array in samples[0].items()}
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def _post(items: list[_Item], call: Callable[..., None], *arguments: Any) -> None:
    try:
        items[0].future.get_loop().call_soon_threadsafe(call, *arguments)
    except RuntimeError:  # the loop has ended: nobody is left to be told
        return


def _resolve_all(items: list[_Item], answers: list[Answer]) -> None:
    for item, answer in zip(items, answers, strict=True):
        if not item.future.done():
            item.future.set_result(answer)


def _fail_all(items: list[_Item], reason: str) -> None:
    for item in items:
        _fail(item, ServiceError("internal", f"the engine failed: {reason}"))


def _fail_each(items: list[_Item], fault: Fault) -> None:
    for item in items:
        _fail(item, ServiceError(**asdict(fault)))


def _fail(item: _Item, error: Exception) -> None:
    if not item.future.done():
        item.future.set_exception(error)


def _closing() -> ServiceError:
    return ServiceError("shutting_down", "the service is shutting down; connect again in a moment")


def _hopeless(expected_s: float, deadline_s: float) -> ServiceError:
    expected, deadline = f"{1000 * expected_s:.1f} ms", f"{1000 * deadline_s:.1f} ms"
    return ServiceError(
        "deadline",
        f"not run: the answer would take at least {expected}, the deadline is {deadline}; ask earlier or allow more",
        field="deadline_ms",
        expected=f"at least {expected}",
        got=deadline,
    )


def _expire(item: _Item, deadline_s: float) -> None:
    _fail(
        item,
        ServiceError(
            "deadline",
            f"no answer within the deadline of {1000 * deadline_s:.1f} ms",
            field="deadline_ms",
            expected=f"an answer within {1000 * deadline_s:.1f} ms",
        ),
    )
