"""A collector of traces for tests: OTLP over HTTP, protobuf (as ours is sent) or JSON (as Triton's is)."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from service_harness import eventually

INTERNAL, SERVER, CLIENT = 1, 2, 3
"""Kinds of spans, by OTLP's numbers."""
ERROR = 2


@dataclass(frozen=True)
class Span:
    """start, end: nanoseconds since 1970. links: ids of spans."""

    service: str
    name: str
    kind: int
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    status: int
    links: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


class Collector:
    """Keeps every span that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.types: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                kind = self.headers["Content-Type"]
                outer.types.add(kind)
                good = self.path == "/v1/traces"
                if good:
                    outer.spans += _spans(body, kind)
                self.send_response(200 if good else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def named(self, service: str, name: str) -> list[Span]:
        return [span for span in list(self.spans) if (span.service, span.name) == (service, name)]

    def wait(self, service: str, name: str, count: int = 1) -> list[Span]:
        """At least so many spans of a name, in the order of their starts."""
        eventually(lambda: len(self.named(service, name)) >= count, 20)
        return sorted(self.named(service, name), key=lambda span: span.start)

    def below(self, span: Span) -> dict[str, Span]:
        """Its children by name."""
        return {child.name: child for child in list(self.spans) if child.parent == span.id}


@contextmanager
def collector() -> Iterator[Collector]:
    made = Collector()
    try:
        yield made
    finally:
        made.close()


def _spans(body: bytes, kind: str) -> list[Span]:
    request = ExportTraceServiceRequest()
    if kind == "application/json":
        request = json_format.ParseDict(_hex_as_base64(json.loads(body)), request, ignore_unknown_fields=True)
    else:
        request.ParseFromString(body)
    return [
        Span(
            _attributes(resource.resource.attributes).get("service.name", ""),
            span.name,
            span.kind,
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            _attributes(span.attributes),
            span.status.code,
            tuple(link.span_id.hex() for link in span.links),
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _attributes(items: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value") or "string_value") for item in items}


def _hex_as_base64(value: Any) -> Any:
    """OTLP's JSON writes ids in hexadecimal, protobuf's in base64."""
    import base64

    if isinstance(value, list):
        return [_hex_as_base64(item) for item in value]
    if not isinstance(value, dict):
        return value
    ids = ("traceId", "spanId", "parentSpanId")
    return {
        key: base64.b64encode(bytes.fromhex(item)).decode() if key in ids else _hex_as_base64(item)
        for key, item in value.items()
    }
