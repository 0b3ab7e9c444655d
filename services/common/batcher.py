"""Many sessions, one engine. A thread owns the engine and takes whatever waits when the engine is free: a lone request
is never delayed to wait for company, and under load requests of different robots share a run."""

import asyncio
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.engine import Arrays, Engine
from services.common.errors import ServiceError
from services.common.logs import get_logger

_TROUBLE_S = 10.0

log = get_logger("batcher")


@dataclass(frozen=True)
class Answer:
    """Outputs of one sample (no batch dimension), and how it got them: seconds waited and run, samples in its batch."""

    outputs: dict[str, NDArray[Any]]
    queue_s: float
    infer_s: float
    batch: int


@dataclass(eq=False)
class _Item:
    inputs: Arrays
    future: asyncio.Future[Answer]
    submitted: float


class Batcher:
    """Runs samples through an engine on a thread of its own. Made and used on one event loop."""

    def __init__(self, engine: Engine, *, on_batch: Callable[[int], None] = lambda _: None) -> None:
        self._engine = engine
        self._on_batch = on_batch
        self._limit = engine.batch_sizes[-1]
        self._waiting: dict[Hashable, _Item] = {}  # in order of arrival
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"engine-{engine.name}", daemon=True)
        self._thread.start()
        self.last_error: str | None = None
        self.failed_at = 0.0

    async def run(self, key: Hashable, inputs: Arrays, *, deadline_s: float | None = None) -> Answer:
        """The engine's answer for one sample (arrays without batch dimension).

        key: whose request this is. A newer request of the same key takes the place of one that still waits, whose
        caller gets ServiceError `superseded`. deadline_s: seconds from now; when it passes, the caller gets `deadline`
        at once, whether the sample waits or runs. An exception of the engine becomes `internal`.
        """
        loop = asyncio.get_running_loop()
        item = _Item(inputs, loop.create_future(), time.perf_counter())
        with self._wake:
            if self._closed:
                raise ServiceError("shutting_down", "the service is shutting down; connect again in a moment")
            older = self._waiting.get(key)
            self._waiting[key] = item  # a dict keeps the place in the queue, so a fast sender cannot starve itself
            self._wake.notify()
        if older is not None:
            _fail(older, ServiceError("superseded", "a newer observation of this session has taken its place"))
        timer = None if deadline_s is None else loop.call_later(max(deadline_s, 0.0), _expire, item, deadline_s)
        try:
            return await item.future
        finally:
            if timer is not None:
                timer.cancel()
            with self._wake:  # after a deadline or a cancellation it may still wait
                if self._waiting.get(key) is item:
                    del self._waiting[key]

    @property
    def depth(self) -> int:
        """Samples waiting now."""
        return len(self._waiting)

    def close(self) -> None:
        """Answer everything that waits with `shutting_down`, let the running batch end, stop the thread."""
        with self._wake:
            self._closed = True
            left = list(self._waiting.values())
            self._waiting.clear()
            self._wake.notify()
        for item in left:
            _fail(item, ServiceError("shutting_down", "the service is shutting down; connect again in a moment"))
        self._thread.join(timeout=1.0)  # one that hangs in the engine dies with the process

    @property
    def trouble(self) -> str | None:
        """The last run's failure, for ten seconds: then a new request may try, or a pod taken out of service would
        never come back."""
        return self.last_error if time.monotonic() - self.failed_at < _TROUBLE_S else None

    def _take(self) -> list[_Item] | None:
        with self._wake:
            while not self._waiting and not self._closed:
                self._wake.wait()
            if self._closed:
                return None
            keys = list(self._waiting)[: self._limit]
            return [self._waiting.pop(key) for key in keys]

    def _work(self) -> None:
        while (items := self._take()) is not None:
            start = time.perf_counter()
            try:
                outputs = self._engine.run(_stack([item.inputs for item in items]))
            except Exception as error:  # whatever an engine raises must not end the thread that serves every robot
                self.last_error = f"{type(error).__name__}: {error}"
                self.failed_at = time.monotonic()
                log.error("the engine failed", engine=self._engine.name, batch=len(items), exc_info=error)
                _post(items, _fail_all, items, self.last_error)
                continue
            self.last_error = None
            spent = time.perf_counter() - start
            self._on_batch(len(items))
            answers = [
                Answer({name: array[i] for name, array in outputs.items()}, start - item.submitted, spent, len(items))
                for i, item in enumerate(items)
            ]
            _post(items, _resolve_all, items, answers)


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


def _fail(item: _Item, error: Exception) -> None:
    if not item.future.done():
        item.future.set_exception(error)


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
