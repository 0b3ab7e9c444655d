"""Traces of requests: what the paths of requests touch. Nothing of OpenTelemetry is imported before it is asked for by
the standard environment variables (`recap_client.tracing`); `services.common.spans` makes the spans."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from importlib import import_module
from typing import TYPE_CHECKING

from recap_client.tracing import FIELD, Tracing, wanted

if TYPE_CHECKING:
    from services.common.spans import EngineRun, RequestTrace, ServiceTracing

__all__ = ["FIELD", "REQUEST", "RUN", "UNTRACED", "call", "current", "engine_run", "from_environment"]

REQUEST: ContextVar["RequestTrace | None"] = ContextVar("request_trace", default=None)
"""The request that a task answers."""

RUN: ContextVar["EngineRun | None"] = ContextVar("engine_run", default=None)
"""The run that an engine's thread is in."""

UNTRACED: AbstractContextManager[None] = nullcontext()


def from_environment(service: str) -> "ServiceTracing | None":
    """None where the environment asks for no traces. Raises TracingError."""
    if not wanted():
        return None
    made = Tracing(service)  # first: it says what is missing
    found: ServiceTracing = import_module("services.common.spans").ServiceTracing(made)
    return found


def current() -> "RequestTrace | None":
    """The trace of the request that this task answers: where it is sampled, and not answered yet."""
    trace = REQUEST.get()
    return trace if trace is not None and trace.open else None


def engine_run(
    waited: Sequence[tuple["RequestTrace | None", float]], start: float
) -> AbstractContextManager["EngineRun | None"]:
    """While the engine runs a batch. waited: of each of its requests, the trace and when it was submitted; start: of
    the run (`time.perf_counter` seconds)."""
    traced = [(trace, submitted) for trace, submitted in waited if trace is not None]
    return traced[0][0].run_with(traced, start, len(waited)) if traced else UNTRACED


def call(name: str) -> AbstractContextManager[str | None]:
    """While an engine asks a server elsewhere: gives the `traceparent` to send along, or None."""
    run = RUN.get()
    return UNTRACED if run is None else run.call(name)
