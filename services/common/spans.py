"""The spans of a request: one of the service, and below it `decode`, `queue`, `infer`, `encode`, from times that were
taken anyway. Several requests may share a run of the engine: each has its `infer`, and those of the others link to that
of the first, below which calls to a server elsewhere are."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import Token
from types import TracebackType
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Tracer, set_span_in_context

from recap_client.tracing import FIELD, Tracing, failed, parent, traceparent
from services.common.errors import fault_of
from services.common.tracing import REQUEST, RUN, current


class RequestTrace:
    """A request under way. Times are `time.perf_counter` seconds."""

    def __init__(self, tracer: Tracer, name: str, received: float, context: Context) -> None:
        self._tracer, self._received = tracer, received
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()
        self.span = tracer.start_span(name, context, SpanKind.SERVER, start_time=self.ns(received))
        self.open = self.span.is_recording()
        self._below = set_span_in_context(self.span)
        self._ran_until: float | None = None

    @property
    def traceparent(self) -> str:
        """For whoever is told of the request."""
        return traceparent(self.span)

    def ns(self, at: float) -> int:
        """Nanoseconds since 1970."""
        return self._epoch_ns + int(1e9 * at)

    def note(self, attributes: Mapping[str, Any]) -> None:
        """What else is known of the request, under `recap.`."""
        self.span.set_attributes({f"recap.{name}": value for name, value in attributes.items()})

    def decoded(self, seconds: float) -> None:
        """Reading the request took so long."""
        self._child("decode", self._received, self._received + seconds)

    def run(self, submitted: float, start: float, links: Sequence[Link], batch: int) -> Span:
        """It has waited from `submitted` to `start`, and runs; the caller ends the span and tells `ran`."""
        self._child("queue", submitted, start)
        attributes = {"recap.batch_size": batch}
        return self._tracer.start_span("infer", self._below, SpanKind.INTERNAL, attributes, links, self.ns(start))

    def run_with(self, traced: Sequence[tuple["RequestTrace", float]], start: float, batch: int) -> "EngineRun":
        """The run of a batch: its traced requests, this one the first, and when each was submitted."""
        return EngineRun(traced, start, batch)

    def ran(self, span: Span, until: float) -> None:
        """The run behind the span of `run` has ended."""
        span.end(self.ns(until))
        self._ran_until = until

    def call(self, name: str, below: Span) -> Span:
        """A call to a server elsewhere."""
        return self._tracer.start_span(name, set_span_in_context(below), SpanKind.CLIENT)

    def end(self, code: str) -> None:
        """It is answered; code: "ok" or that of the error."""
        now = time.perf_counter()
        if self._ran_until is not None:
            self._child("encode", self._ran_until, now)
        self.note({"code": code})
        if code != "ok":
            failed(self.span, code)
        self.open = False
        self.span.end(self.ns(now))

    def _child(self, name: str, start: float, end: float) -> None:
        self._tracer.start_span(name, self._below, start_time=self.ns(start)).end(self.ns(end))


class ServiceTracing:
    """The traces of one service."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    @contextmanager
    def request(
        self, name: str, *, dialect: str, received: float, sent: object, around: AbstractContextManager[None]
    ) -> Iterator[None]:
        """A request of which the last byte came at `received`, inside of which `around` is entered. sent: the
        `traceparent` that came with it, if any; anything else begins a trace of its own."""
        trace = RequestTrace(self._tracing.tracer, name, received, parent(sent))
        trace.note({"dialect": dialect})
        REQUEST.set(trace)
        code = "ok"
        try:
            with around:
                yield
        except BaseException as error:
            code = fault_of(error).code if isinstance(error, Exception) else "cancelled"
            raise
        finally:
            REQUEST.set(None)
            trace.end(code)

    def note(self, attributes: Mapping[str, Any]) -> None:
        """What is known of the request that this task answers."""
        if (trace := current()) is not None:
            trace.note(attributes)

    def decoded(self, seconds: float, attributes: Mapping[str, Any]) -> None:
        """Reading it took so long, and what it is."""
        if (trace := current()) is not None:
            trace.decoded(seconds)
            trace.note(attributes)

    def told(self) -> dict[str, str]:
        """The part of a message to another service that lets it continue the trace."""
        return {} if (trace := current()) is None else {FIELD: trace.traceparent}

    def close(self) -> None:
        """Send what waits, for a second at most."""
        self._tracing.close()


class EngineRun:
    """A run of the engine for traced requests, as a context manager on the engine's thread."""

    def __init__(self, traced: Sequence[tuple[RequestTrace, float]], start: float, batch: int) -> None:
        self._spans: list[tuple[RequestTrace, Span]] = []
        for trace, submitted in traced:
            links = [Link(self._spans[0][1].get_span_context())] if self._spans else []
            self._spans.append((trace, trace.run(submitted, start, links, batch)))
        self._token: Token[EngineRun | None] | None = None

    def __enter__(self) -> "EngineRun":
        self._token = RUN.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        until = time.perf_counter()
        if self._token is not None:
            RUN.reset(self._token)
        for request, span in self._spans:
            if isinstance(error, Exception):
                failed(span, fault_of(error).code)
            request.ran(span, until)

    @contextmanager
    def call(self, name: str) -> Iterator[str]:
        """While a server elsewhere is asked; gives the `traceparent` for it."""
        request, below = self._spans[0]
        span = request.call(name, below)
        try:
            yield traceparent(span)
        except Exception as error:
            failed(span, str(getattr(error, "reason", type(error).__name__)))
            raise
        finally:
            span.end()
