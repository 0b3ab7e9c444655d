"""OpenTelemetry traces of requests, off unless the standard environment variables ask for them.

A span per request; its context goes with the message as `traceparent` (W3C Trace Context), and the service continues
it. A thread sends the spans in batches (OTLP over HTTP): a collector that is slow or away costs spans, never a request.
OpenTelemetry is imported by who makes a `Tracing`, and by nobody else.
"""

import atexit
import logging
import os
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

FIELD = "traceparent"
"""Of a message, and the name of the HTTP header."""

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_LONGEST = 512
_CLOSE_S = 1.0
_QUIET_S = 60.0
_SHOWN = ("robot", "episode", "seq")


class TracingError(ValueError):
    """Traces are asked for and cannot be made."""


def wanted() -> bool:
    """Does the environment ask for traces: an OTLP endpoint, or OTEL_TRACES_EXPORTER=otlp (the endpoint is then
    http://localhost:4318)? OTEL_SDK_DISABLED=true and OTEL_TRACES_EXPORTER=none say no. Raises TracingError."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if exporter not in ("", "otlp", "none"):
        raise TracingError(f"OTEL_TRACES_EXPORTER: expected otlp or none, got {exporter!r}")
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return False
    return exporter == "otlp" or any(os.environ.get(name) for name in ENDPOINTS)


@cache
def process_tracing(service: str) -> "Tracing | None":
    """That of this process, ended with it; None where none is `wanted`. Raises TracingError."""
    if not wanted():
        return None
    made = Tracing(service)
    atexit.register(made.close)
    return made


class _Seldom(logging.Filter):
    """One line a minute: a collector that is away is told of several times a second."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002 - logging's signature
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _QUIET_S
        return True


_SELDOM = _Seldom()


class Tracing:
    """Makes spans and sends them, as the variables OTEL_EXPORTER_OTLP_*, OTEL_TRACES_SAMPLER*, OTEL_BSP_* and
    OTEL_RESOURCE_ATTRIBUTES say. service: `service.name`, where OTEL_SERVICE_NAME gives none. Raises TracingError."""

    def __init__(self, service: str) -> None:
        protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "http/protobuf")
        if protocol != "http/protobuf":
            raise TracingError(f"{_PROTOCOLS[1]}: expected http/protobuf, got {protocol!r}")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind
        except ImportError as error:
            raise TracingError(
                f"traces are asked for ({' or '.join(ENDPOINTS)}), and {error.name} cannot be imported; install it "
                "with `pip install 'recap-client[trace]'`, or unset the variable"
            ) from error
        named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {"service.name": service})
        for name in (OTLPSpanExporter.__module__, "opentelemetry.sdk._shared_internal"):  # that of the queue
            logging.getLogger(name).addFilter(_SELDOM)
        self._exporter: Any = OTLPSpanExporter()
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # its own end may take 30 s
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self.tracer = self._provider.get_tracer("recap")
        self._client = SpanKind.CLIENT
        self._ending, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._end, name="traces-end", daemon=True).start()  # none can be started at the exit

    @contextmanager
    def request(self, message: MutableMapping[str, Any]) -> Iterator[None]:
        """While `message` is asked and answered: a span, whose context the message takes along."""
        shown = {f"recap.{name}": message[name] for name in _SHOWN if name in message}
        span = self.tracer.start_span(str(message["type"]), kind=self._client, attributes=shown)
        message[FIELD] = traceparent(span)
        try:
            yield
        except Exception as error:
            failed(span, str(getattr(error, "code", type(error).__name__)))
            raise
        finally:
            span.end()

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Send what waits, for so long at most, and end. May be called twice."""
        self._ending.set()
        if not self._ended.wait(timeout_s):
            self._exporter.shutdown()  # or it tries on

    def _end(self) -> None:
        self._ending.wait()
        self._provider.shutdown()
        self._ended.set()


def traceparent(span: "Span") -> str:
    """The context of a span as the text of W3C Trace Context."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def parent(received: object) -> "Context":
    """The context that somebody sent as `traceparent`; an empty one for what is none."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not isinstance(received, str) or len(received) > _LONGEST:
        return Context()
    return TraceContextTextMapPropagator().extract({FIELD: received}, Context())


def failed(span: "Span", code: str) -> None:
    """Mark a span as failed. code: of a typed error, or the name of an exception."""
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", code)
    span.set_status(Status(StatusCode.ERROR, code))
