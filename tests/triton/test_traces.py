"""One trace from the robot through the policy service into a real Triton."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recap_client.policy import RemotePolicy
from recap_client.robots.base import Observation
from recap_client.tracing import Tracing, process_tracing
from repository_factory import TASKS
from service_harness import observation
from services.common.server import running
from services.common.settings import PolicySettings
from services.policy.app import create_app
from services.policy.pipeline import load_policy_engine
from trace_collector import CLIENT, ERROR, SERVER, Collector, Span, collector
from triton_server import Triton, triton

TRITON = "triton-inference-server"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collector() as made:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        process_tracing.cache_clear()
        yield made
        process_tracing.cache_clear()


@pytest.fixture
def traced(models: Path, traces: Collector) -> Iterator[Triton]:
    """As docs/observability.md says: it traces the requests that bring a context, and no other."""
    options = ("mode=opentelemetry", "rate=0", "level=TIMESTAMPS", f"opentelemetry,url={traces.url}/v1/traces")
    with triton(models, *(f"--trace-config={option}" for option in options)) as server:
        yield server


@pytest.mark.parametrize("way", ["grpc", "http", "grpc ?shm=off", "http ?shm=off"])
def test_one_trace_from_robot_to_triton(models: Path, traced: Triton, traces: Collector, way: str) -> None:
    scheme, _, options = way.partition(" ")
    app = create_app(load_policy_engine(models, 1.0, f"triton@{traced.url(scheme, options)}"), PolicySettings())
    with running(app, app.state.limits) as bound:
        spec = app.state.service.spec.robot
        policy = RemotePolicy(f"ws://127.0.0.1:{bound.port}/act", spec, tracing=Tracing("robot"))
        policy.reset("e1", TASKS[0], 0)
        found = observation(spec)
        policy.infer(Observation(found["images"], found["state"], time.monotonic()), TASKS[0])
        (asked,) = traces.wait("robot", "act")
        (call,) = traces.wait("recap-policy", "triton.infer")
        (infer,) = traces.wait("recap-policy", "infer")
        (served,) = traces.wait("recap-policy", "act")
        (request,) = traces.wait(TRITON, "InferRequest")
        traced.kill()
        with pytest.raises(Exception, match="unavailable"):
            policy.infer(Observation(found["images"], found["state"], time.monotonic()), TASKS[0])
        lost = traces.wait("recap-policy", "infer", 2)[1]
        policy.close()
    chain = [asked, served, infer, call, request]
    assert [span.trace for span in chain] == [asked.trace] * 5
    assert [span.parent for span in chain[1:]] == [span.id for span in chain[:-1]]
    assert (call.kind, request.kind) == (CLIENT, SERVER)
    assert [_inside(*pair) for pair in zip(chain[1:], chain, strict=False)] == [True] * 4
    assert {span.name for span in traces.spans if span.service == TRITON} >= {"InferRequest", "policy", "compute"}
    assert (lost.status, lost.attributes["error.type"]) == (ERROR, "unavailable")


def _inside(inner: Span, outer: Span, slack_ns: int = 2_000_000) -> bool:
    """By two processes' readings of one clock."""
    return outer.start - slack_ns <= inner.start <= inner.end <= outer.end + slack_ns
