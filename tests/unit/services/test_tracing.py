"""Traces from the robot to the engine, as a collector gets them; and that a collector is never waited for."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recap_client.policy import RemotePolicy
from recap_client.robots.base import Observation
from recap_client.session import ServiceRefused
from recap_client.tracing import Tracing, TracingError, parent, process_tracing, wanted
from recap_client.value import RemoteCritic
from repository_factory import TASKS
from service_harness import NativeClient, Served, act, critic_server, eventually, fetch, observation, policy_server
from trace_collector import CLIENT, ERROR, INTERNAL, SERVER, Collector, collector
from triton_server import free_ports

STAGES = ("decode", "queue", "infer", "encode")
SENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0{}"


@pytest.fixture(autouse=True)
def _no_traces_of_others(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    process_tracing.cache_clear()
    yield
    process_tracing.cache_clear()


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector, and an environment that asks for traces."""
    with collector() as made:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield made


def seen(served: Served) -> Observation:
    found = observation(served.engine.spec.robot)
    return Observation(found["images"], found["state"], time.monotonic())


def remote(served: Served, **options: Any) -> RemotePolicy:
    policy = RemotePolicy(served.url(), served.engine.spec.robot, robot="arm", **options)
    policy.reset("e1", TASKS[0], 0)
    return policy


def test_one_trace_through_robot_and_service(models: Path, traces: Collector) -> None:
    with policy_server(models) as served:
        policy = remote(served)
        chunks = [policy.infer(seen(served), TASKS[0]) for _ in range(3)]
        policy.close()
        asked = traces.wait("recap-client", "act", 3)
        served_spans = traces.wait("recap-policy", "act", 3)
        traces.wait("recap-policy", "encode", 3)
    assert len({span.trace for span in asked}) == 3 and traces.types == {"application/x-protobuf"}
    for chunk, ours, theirs in zip(chunks, asked, served_spans, strict=True):
        assert (ours.kind, theirs.kind, ours.parent) == (CLIENT, SERVER, "")
        assert (theirs.trace, theirs.parent) == (ours.trace, ours.id)
        assert ours.attributes == {"recap.robot": "arm", "recap.episode": "e1", "recap.seq": chunk.seq}
        assert theirs.attributes == {
            "recap.dialect": "recap.v1", "recap.code": "ok", "recap.robot": "arm", "recap.episode": "e1",
            "recap.model.version": "1", "recap.model.hash": served.engine.hash[:12],
        }  # fmt: skip
        stages = traces.below(theirs)
        assert set(stages) == set(STAGES) and {span.trace for span in stages.values()} == {ours.trace}
        assert {span.kind for span in stages.values()} == {INTERNAL}
        assert stages["infer"].attributes == {"recap.batch_size": 1}
        edges = [theirs.start, *(at for name in STAGES for at in (stages[name].start, stages[name].end)), theirs.end]
        assert edges == sorted(edges)
        for name in ("decode", "queue", "infer"):
            assert stages[name].seconds == pytest.approx(chunk.timing[f"{name}_ms"] / 1000, abs=1e-3)
        assert theirs.seconds >= chunk.timing["total_ms"] / 1000 - 1e-5
        assert sum(span.seconds for span in stages.values()) <= theirs.seconds <= ours.seconds
        assert chunk.latency_s == pytest.approx(ours.seconds, abs=0.05)


def test_requests_that_share_a_run(models: Path, traces: Collector) -> None:
    """Each has its `infer`; that of the others is linked to the first one's."""
    with policy_server(models) as served, ThreadPoolExecutor(3) as pool:
        robots = [remote(served) for _ in range(3)]
        with served.engine.held():
            first = pool.submit(robots[0].infer, seen(served), TASKS[0])
            served.engine.entered.wait(10)
            rest = [pool.submit(robot.infer, seen(served), TASKS[0]) for robot in robots[1:]]
            eventually(lambda: served.service.batcher.depth == 2)
        assert [call.result(20).timing["batch_size"] for call in (first, *rest)] == [1, 2, 2]
        runs = traces.wait("recap-policy", "infer", 3)
        for robot in robots:
            robot.close()
    assert [span.attributes["recap.batch_size"] for span in runs] == [1, 2, 2]
    assert len({span.trace for span in runs}) == 3
    linked = [span for span in runs if span.links]
    assert len(linked) == 1 and linked[0].links[0] in {span.id for span in runs if not span.links}


def test_the_critic_continues_what_it_is_shown_and_what_it_is_asked(models: Path, traces: Collector) -> None:
    with critic_server(models) as critic, policy_server(models, critic_url=critic.url("/value")) as served:
        policy = remote(served)
        policy.infer(seen(served), TASKS[0])
        (shown,) = traces.wait("recap-critic", "observe")
        judge = RemoteCritic(critic.url("/value"), critic.engine.spec.robot)
        judge.observe(seen(served), TASKS[0])
        (asked,) = traces.wait("recap-client", "observe")
        (acted,) = traces.wait("recap-policy", "act")
        judged = traces.wait("recap-critic", "observe", 2)[1]
        judge.close()
        policy.close()
    assert (shown.trace, shown.parent) == (acted.trace, acted.id)
    assert (judged.trace, judged.parent) == (asked.trace, asked.id)
    assert set(traces.below(judged)) == {"queue", "infer", "encode"}


def test_failures_are_marked(models: Path, traces: Collector) -> None:
    with policy_server(models) as served:
        policy = remote(served)
        broken = seen(served)
        broken.state[0] = np.nan
        with pytest.raises(ServiceRefused, match="bad_observation"):
            policy.infer(broken, TASKS[0])
        served.engine.failure = RuntimeError("no more memory")
        with pytest.raises(ServiceRefused, match="internal"):
            policy.infer(seen(served), TASKS[0])
        policy.close()
        ours, theirs = traces.wait("recap-client", "act", 2), traces.wait("recap-policy", "act", 2)
        run = traces.wait("recap-policy", "infer")
    for spans in (ours, theirs):
        assert [(s.status, s.attributes["error.type"]) for s in spans] == [
            (ERROR, "bad_observation"),
            (ERROR, "internal"),
        ]
    assert [(span.parent, span.status) for span in run] == [(theirs[1].id, ERROR)]


def test_callers_of_http_and_those_that_send_nonsense(models: Path, traces: Collector) -> None:
    with policy_server(models) as served:
        spec = served.engine.spec.robot
        body = {**observation(spec), "instruction": TASKS[0]}
        payload = {"state": body["state"].tolist(), "instruction": TASKS[0]}
        payload |= {name: frame.tolist() for name, frame in body["images"].items()}
        status, _ = fetch(
            served.http("/act"), data=json.dumps(payload).encode(), headers={"traceparent": SENT.format(1)}
        )
        assert status == 200
        (posted,) = traces.wait("recap-policy", "act")
        with NativeClient(served.url()) as client:
            for number, sent in enumerate((None, b"bytes", 7, "", "00-zz", "0" * 10_000, ["a"], SENT.format(1))):
                assert client.ask(act(spec, number, traceparent=sent))["type"] == "chunk"
        spans = traces.wait("recap-policy", "act", 9)
    assert (posted.trace, posted.parent, posted.attributes["recap.dialect"]) == (*SENT.split("-")[1:3], "openvla")
    assert [span.parent for span in spans[1:-1]] == [""] * 7 and len({span.trace for span in spans[1:-1]}) == 7
    assert (spans[-1].trace, spans[-1].parent) == (posted.trace, posted.parent)


def test_what_the_caller_does_not_sample_is_not_sampled(models: Path, traces: Collector) -> None:
    with policy_server(models) as served, NativeClient(served.url()) as client:
        spec = served.engine.spec.robot
        for number, sampled in enumerate((0, 0, 1)):
            client.ask(act(spec, number, traceparent=SENT.format(sampled)))
        traces.wait("recap-policy", "encode")
    assert len(traces.spans) == 5


def test_the_sampler_of_the_environment(traces: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    made = Tracing("sampled")
    messages: list[dict[str, Any]] = [{"type": "act", "seq": number} for number in range(400)]
    for message in messages:
        with made.request(message):
            pass
    made.close(10)
    told = {message["seq"] for message in messages if int(message["traceparent"][-2:], 16) & 1}
    assert 60 < len(told) < 140  # outside by chance: less than once in a million runs
    assert {span.attributes["recap.seq"] for span in traces.named("sampled", "act")} == told


@pytest.mark.parametrize("silent", [False, True])
def test_a_collector_that_is_away_or_silent_costs_nobody_anything(
    models: Path, silent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1] if silent else free_ports(1)[0]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
        with policy_server(models) as served:
            policy = remote(served)
            for _ in range(20):
                assert policy.infer(seen(served), TASKS[0], deadline_s=5.0).actions.shape[0] > 0
            policy.close()
            began = time.monotonic()
        assert time.monotonic() - began < 15  # a second, not the half minute that its own end may take
        assert len([record for record in caplog.records if record.name.startswith("opentelemetry")]) <= 1


def test_off_imports_nothing_of_opentelemetry(models: Path) -> None:
    """In the service no more than FastAPI does, which takes its interface; in the robot's process nothing. Both after a
    whole request."""
    serve = f"""
import sys
from pathlib import Path
from services.common.server import running
from services.common.settings import PolicySettings
from services.policy.app import create_app
from services.policy.pipeline import load_policy_engine
app = create_app(load_policy_engine(Path({str(models)!r}), 1.0, "onnxruntime"), PolicySettings())
with running(app, app.state.limits) as bound:
    print(bound.port, flush=True)
    sys.stdin.read()
ours = ("opentelemetry.sdk", "opentelemetry.exporter", "services.common.spans")
print([name for name in sys.modules if name.startswith(ours)])
"""
    ask = """
import sys, time
import numpy as np
from recap_client.policy import RemotePolicy
from recap_client.robots.base import Observation
from recap_client.session import served_spec
url = f"ws://127.0.0.1:{sys.argv[1]}/act"
spec = served_spec(url)
policy = RemotePolicy(url, spec)
images = {c.name: np.zeros((c.height, c.width, 3), np.uint8) for c in spec.cameras}
policy.infer(Observation(images, np.zeros(len(spec.state), np.float32), time.monotonic()), sys.argv[2])
policy.close()
print([name for name in sys.modules if name.partition(".")[0] == "opentelemetry"])
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", serve], stdin=pipe, stdout=pipe, text=True) as service:
        assert service.stdin is not None and service.stdout is not None
        command = [sys.executable, "-c", ask, service.stdout.readline().strip(), TASKS[0]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        service.stdin.close()
        loaded = service.stdout.read().strip()
    assert (done.returncode, done.stdout.strip(), loaded) == (0, "[]", "[]"), done.stderr


@pytest.mark.parametrize(
    ("variables", "on"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
    ],
)
def test_who_asks_for_traces(variables: dict[str, str], on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wanted() is on


def test_what_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(TracingError, match="OTEL_TRACES_EXPORTER: expected otlp or none, got 'zipkin'"):
        wanted()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(TracingError, match="OTEL_EXPORTER_OTLP_PROTOCOL: expected http/protobuf, got 'grpc'"):
        Tracing("x")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TracingError, match=r"pip install 'recap-client\[trace\]'"):
        Tracing("x")


def test_the_name_of_a_service_may_be_given(traces: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "north-wing")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=lab")
    made = Tracing("recap-policy")
    made.tracer.start_span("x").end()
    made.close(10)
    made.close()
    assert [span.service for span in traces.spans] == ["north-wing"]


def test_only_contexts_are_parents() -> None:
    for sent in (None, b"x", 7, "", "nonsense", "x" * 513, SENT.format(1) + "-" + "0" * 500):
        assert parent(sent) == {}, sent
    assert parent(SENT.format(1)) != {}
