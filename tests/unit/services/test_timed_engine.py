"""The batcher and an engine that runs elsewhere: it is told how long its answer is worth anything, and its typed errors
reach the robots as they are."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_laws import batch
from repository_factory import build_repository
from services.common.batcher import Batcher
from services.common.engine import Engine, load_engine
from services.common.errors import ServiceError
from services.options import ServeArgs
from services.supervise import _engine


class Elsewhere:
    """The embedded engine, with the door of a timed one; `before` may raise what the way there would."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.told: list[float | None] = []
        self.before: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run_within(self, inputs: Any, seconds: float | None) -> Any:
        self.told.append(seconds)
        self.before()
        return self._engine.run(inputs)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Elsewhere]:
    loaded = load_engine(build_repository(tmp_path, models=("policy",)), "policy")
    yield Elsewhere(loaded)
    loaded.close()


def ask(engine: Elsewhere, *deadlines: float | None) -> tuple[list[Any], Batcher]:
    """All at once; answers or errors."""
    one = {name: array[0] for name, array in batch(engine, 1).items()}  # type: ignore[arg-type]

    async def work() -> tuple[list[Any], Batcher]:
        batcher = Batcher(engine)  # type: ignore[arg-type]
        calls = [batcher.run(i, one, deadline_s=deadline) for i, deadline in enumerate(deadlines)]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        batcher.close()
        return replies, batcher

    return asyncio.run(work())


def test_the_time_left_is_told(engine: Elsewhere) -> None:
    ask(engine, 20.0)
    assert len(engine.told) == 1 and engine.told[0] is not None and 0 < engine.told[0] <= 20.0
    ask(engine, None)
    assert engine.told[1] is None


def test_a_run_lasts_as_long_as_anyone_in_it_has_time(engine: Elsewhere) -> None:
    replies, _ = ask(engine, 20.0, 30.0, 25.0)
    assert not any(isinstance(reply, Exception) for reply in replies)
    assert any(told is not None and told > 25.0 for told in engine.told)
    engine.told.clear()
    ask(engine, 20.0, None)
    assert None in engine.told


@pytest.mark.parametrize("code, trouble", [("unavailable", True), ("deadline", False)])
def test_typed_errors_reach_everyone_in_the_run(engine: Elsewhere, code: str, trouble: bool) -> None:
    """A missed deadline says nothing about the engine; one that is not there makes the service not ready."""

    def fail() -> None:
        raise ServiceError(code, "policy 1 at grpc://triton:8001: gone", retry_after_s=1.0)

    engine.before = fail
    replies, batcher = ask(engine, None, 20.0, 20.0)
    faults = [reply.fault for reply in replies]
    assert [(f.code, f.message, f.retry_after_s) for f in faults] == [
        (code, "policy 1 at grpc://triton:8001: gone", 1.0)
    ] * 3
    assert batcher.trouble == ("policy 1 at grpc://triton:8001: gone" if trouble else None)


def test_other_errors_stay_internal(engine: Elsewhere) -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    engine.before = fail
    replies, _ = ask(engine, 20.0)
    assert replies[0].fault.code == "internal" and "RuntimeError: boom" in replies[0].fault.message


def test_where_triton_is_goes_with_the_engine() -> None:
    here = ServeArgs("policy", Path("models"), engine="triton")
    assert _engine(here) == "triton"
    there = ServeArgs("policy", Path("models"), engine="triton", triton_url="http://h:8000?shm=off")
    assert _engine(there) == "triton@http://h:8000?shm=off"
    with pytest.raises(ValueError, match="--triton-url: expected --engine triton beside it, got --engine onnxruntime"):
        _engine(ServeArgs("policy", Path("models"), triton_url="grpc://h"))
