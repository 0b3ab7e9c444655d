"""The batcher: company only when the engine is busy, the newest of a session, deadlines, failures."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repository_factory import CHUNK, MAX_TOKENS
from service_harness import SpyEngine
from services.common.batcher import Batcher
from services.common.engine import load_engine
from services.common.errors import ServiceError


def sample(seed: int) -> dict[str, Any]:
    g = np.random.default_rng(seed)
    return {
        "images": g.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8),
        "state": g.normal(size=4).astype(np.float32),
        "tokens": g.integers(1, 9, MAX_TOKENS, dtype=np.int32),
        "token_mask": np.arange(MAX_TOKENS) < 6,
        "noise": g.normal(size=(CHUNK, 4)).astype(np.float32),
    }


@asynccontextmanager
async def batching(models: Path, **options: Any) -> AsyncIterator[tuple[Batcher, SpyEngine]]:
    engine = SpyEngine(load_engine(models, "policy"))
    batcher = Batcher(engine, **options)
    try:
        yield batcher, engine
    finally:
        engine.gate.set()
        batcher.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))  # type: ignore[arg-type]


async def busy(batcher: Batcher, engine: SpyEngine) -> "asyncio.Task[Any]":
    """Occupy the engine with one request."""
    engine.entered.clear()
    engine.gate.clear()
    task = asyncio.create_task(batcher.run("blocker", sample(99)))
    await asyncio.to_thread(engine.entered.wait, 10)
    return task


def test_requests_that_wait_share_one_run_and_get_what_they_would_get_alone(models: Path) -> None:
    async def test() -> None:
        async with batching(models) as (batcher, engine):
            alone = [(await batcher.run(i, sample(i))).outputs["actions"] for i in range(7)]
            blocker = await busy(batcher, engine)
            waiting = [asyncio.create_task(batcher.run(i, sample(i))) for i in range(7)]
            await asyncio.sleep(0.05)
            engine.gate.set()
            answers = await asyncio.gather(*waiting)
            await blocker
            assert [len(call["state"]) for call in engine.calls] == [1] * 7 + [1, 7]
            assert {answer.batch for answer in answers} == {7}
            for one, answer in zip(alone, answers, strict=True):
                np.testing.assert_allclose(one, answer.outputs["actions"], atol=1e-6)

    run(test)


def test_more_than_the_largest_batch_is_served_in_order(models: Path) -> None:
    async def test() -> None:
        async with batching(models) as (batcher, engine):
            blocker = await busy(batcher, engine)
            waiting = [asyncio.create_task(batcher.run(i, sample(i))) for i in range(11)]
            await asyncio.sleep(0.05)
            engine.gate.set()
            assert [answer.batch for answer in await asyncio.gather(*waiting)] == [8] * 8 + [3] * 3
            await blocker

    run(test)


def test_a_newer_request_of_a_session_takes_the_place_of_the_older(models: Path) -> None:
    async def test() -> None:
        async with batching(models) as (batcher, engine):
            blocker = await busy(batcher, engine)
            old = asyncio.create_task(batcher.run("a", sample(1)))
            other = asyncio.create_task(batcher.run("b", sample(2)))
            await asyncio.sleep(0.01)
            new = asyncio.create_task(batcher.run("a", sample(3)))
            with pytest.raises(ServiceError) as error:
                await old  # at once: the engine is still held
            assert error.value.fault.code == "superseded"
            engine.gate.set()
            await asyncio.gather(new, other, blocker)
            np.testing.assert_array_equal(engine.calls[-1]["state"], [sample(3)["state"], sample(2)["state"]])

    run(test)


def test_a_deadline_is_answered_while_the_engine_is_busy(models: Path) -> None:
    async def test() -> None:
        async with batching(models) as (batcher, engine):
            blocker = await busy(batcher, engine)
            with pytest.raises(ServiceError) as error:
                await batcher.run("a", sample(1), deadline_s=0.01)
            assert error.value.fault.code == "deadline" and not blocker.done() and batcher.depth == 0
            engine.gate.set()
            await blocker
            assert len(engine.calls) == 1  # what was given up is not run

    run(test)


def test_a_deadline_holds_for_a_request_that_already_runs(models: Path) -> None:
    async def test() -> None:
        async with batching(models) as (batcher, engine):
            engine.gate.clear()
            with pytest.raises(ServiceError) as error:
                await batcher.run("a", sample(1), deadline_s=0.02)
            assert error.value.fault.code == "deadline"

    run(test)


def measured(batcher: Batcher, seconds: float, *, runs: int = 16, ago_s: float = 0.0) -> None:
    """Let the batcher believe that runs of one sample take so long."""
    for _ in range(runs):
        batcher.times.record(1, seconds, time.perf_counter() - ago_s)


def test_a_deadline_shorter_than_a_run_is_refused_at_once_and_not_run(models: Path) -> None:
    async def test() -> None:
        refused: list[str] = []
        async with batching(models, on_refused=refused.append) as (batcher, engine):
            measured(batcher, 30.0)
            with pytest.raises(ServiceError) as error:
                await batcher.run("a", sample(1), deadline_s=20.0)
            message = "the answer would take at least 30000.0 ms, the deadline is 20000.0 ms"
            assert str(error.value) == f"not run: {message}; ask earlier or allow more"
            fault = error.value.fault
            assert (fault.code, fault.field) == ("deadline", "deadline_ms")
            assert (fault.expected, fault.got) == ("at least 30000.0 ms", "20000.0 ms")
            assert refused == ["arrival"] and not engine.calls and batcher.depth == 0
            await batcher.run("a", sample(1), deadline_s=31.0)
            await batcher.run("a", sample(1))

    run(test)


def test_the_queue_before_it_counts_against_a_deadline(models: Path) -> None:
    async def test() -> None:
        async with batching(models) as (batcher, engine):
            measured(batcher, 30.0)
            blocker = await busy(batcher, engine)
            urgent = [asyncio.create_task(batcher.run(i, sample(i), runs_out_s=1.0)) for i in range(8)]
            await asyncio.sleep(0.01)
            with pytest.raises(ServiceError) as error:  # the run under way, theirs, its own
                await batcher.run("late", sample(1), deadline_s=80.0, runs_out_s=5.0)
            assert error.value.fault.code == "deadline" and batcher.depth == 8 and not blocker.done()
            first = asyncio.create_task(batcher.run("first", sample(1), deadline_s=80.0, runs_out_s=-1.0))
            await asyncio.sleep(0.01)
            assert batcher.depth == 9  # before them it is in time
            engine.gate.set()
            await asyncio.gather(blocker, first, *urgent)

    run(test)


def test_what_can_no_longer_be_in_time_is_refused_when_a_batch_is_formed(models: Path) -> None:
    async def test() -> None:
        refused: list[str] = []
        async with batching(models, on_refused=refused.append) as (batcher, engine):
            measured(batcher, 10.0)
            blocker = await busy(batcher, engine)
            waiting = asyncio.create_task(batcher.run("a", sample(1), deadline_s=25.0))
            await asyncio.sleep(0.01)
            assert batcher.depth == 1
            measured(batcher, 100.0)  # the engine has become slow
            engine.gate.set()
            with pytest.raises(ServiceError, match=r"at least 10\d{4}\.\d ms, the deadline is 25000\.0 ms"):
                await waiting
            await blocker
            assert refused == ["queue"] and len(engine.calls) == 1

    run(test)


@pytest.mark.parametrize("evidence", [{"runs": 2}, {"ago_s": 10_000.0}])
def test_nothing_is_refused_on_too_little_or_too_old_evidence(models: Path, evidence: dict[str, Any]) -> None:
    async def test() -> None:
        async with batching(models) as (batcher, _):
            measured(batcher, 30.0, **evidence)
            await batcher.run("a", sample(1), deadline_s=20.0)

    run(test)


def test_a_batcher_learns_its_run_times_and_tells_how_busy_the_engine_was(models: Path) -> None:
    async def test() -> None:
        busy_s: list[float] = []
        async with batching(models, on_busy=busy_s.append) as (batcher, engine):
            engine.edit = lambda outputs: (time.sleep(0.01), outputs)[1]
            for _ in range(4):
                await batcher.run("a", sample(0))
            assert len(busy_s) == 4 and min(busy_s) >= 0.01
            assert batcher.times.seconds(1, time.perf_counter()) in busy_s

    run(test)


def test_a_warm_engine_refuses_the_first_hopeless_deadline_and_answers_the_next(models: Path) -> None:
    async def test() -> None:
        engine = SpyEngine(load_engine(models, "policy"))
        engine.run_times = dict.fromkeys(engine.batch_sizes, 5.0)
        batcher = Batcher(engine)
        with pytest.raises(ServiceError, match=r"^not run: the answer would take at least 5000\.\d ms"):
            await batcher.run("a", sample(0), deadline_s=1.0)
        assert engine.calls == []
        await batcher.run("a", sample(0), deadline_s=20.0)
        batcher.close()

    run(test)


def test_the_robot_that_runs_out_first_is_in_the_first_batch(models: Path) -> None:
    async def test() -> None:
        async with batching(models) as (batcher, engine):
            blocker = await busy(batcher, engine)
            calm = [asyncio.create_task(batcher.run(i, sample(i), runs_out_s=10.0 - i)) for i in range(8)]
            await asyncio.sleep(0.01)
            urgent = asyncio.create_task(batcher.run("urgent", sample(50), runs_out_s=0.1))
            silent = asyncio.create_task(batcher.run("silent", sample(51)))
            await asyncio.sleep(0.01)
            engine.gate.set()
            await asyncio.gather(blocker, urgent, silent, *calm)
            order = [*engine.calls[1]["state"], *engine.calls[2]["state"]]
            np.testing.assert_array_equal(order, [sample(i)["state"] for i in (51, 50, 7, 6, 5, 4, 3, 2, 1, 0)])

    run(test)


def test_a_caller_that_leaves_is_forgotten(models: Path) -> None:
    async def test() -> None:
        async with batching(models) as (batcher, engine):
            blocker = await busy(batcher, engine)
            gone = asyncio.create_task(batcher.run("a", sample(1)))
            await asyncio.sleep(0.01)
            gone.cancel()
            await asyncio.sleep(0.01)
            assert batcher.depth == 0
            engine.gate.set()
            await blocker
            assert len(engine.calls) == 1

    run(test)


def test_an_engine_that_raises_fails_its_batch_and_serves_the_next(models: Path) -> None:
    async def test() -> None:
        async with batching(models) as (batcher, engine):
            engine.failure = RuntimeError("out of memory")
            with pytest.raises(ServiceError, match="out of memory") as error:
                await batcher.run("a", sample(1))
            assert error.value.fault.code == "internal" and "out of memory" in str(batcher.last_error)
            engine.failure = None
            await batcher.run("a", sample(1))
            assert batcher.last_error is None

    run(test)


def test_closing_answers_what_waits(models: Path) -> None:
    async def test() -> None:
        async with batching(models) as (batcher, engine):
            blocker = await busy(batcher, engine)
            waiting = asyncio.create_task(batcher.run("a", sample(1)))
            await asyncio.sleep(0.01)
            threading.Timer(0.1, engine.gate.set).start()  # close waits for the batch that runs
            batcher.close()
            for task in (waiting, asyncio.create_task(batcher.run("b", sample(2)))):
                with pytest.raises(ServiceError) as error:
                    await task
                assert error.value.fault.code == "shutting_down"
            await blocker

    run(test)
