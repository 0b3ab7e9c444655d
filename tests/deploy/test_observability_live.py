"""Real Prometheus and Alertmanager over real services: a breach of the latency objective is delivered as an alert, and
every query of the dashboards has data while robots are served."""

import json
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_versions import SHIFT, add_version
from observability_tools import OBSERVABILITY, Prometheus, Receiver, monitoring
from recap_client.spec import RobotSpec
from repository_factory import build_repository
from service_harness import NativeClient, Served, act, critic_server, eventually, fetch, policy_server
from services.common.server import running
from services.common.settings import ModelSource, PolicySettings, Recording
from services.policy.app import create_app
from services.policy.pipeline import load_policy_engine
from triton_server import triton, triton_repository

TOKEN, ADMIN = "a token for tests", "an admin key for tests"
PAGES = {path.stem: json.loads(path.read_text()) for path in (OBSERVABILITY / "dashboards").glob("*.json")}


def queries(page: str) -> list[tuple[str, str]]:
    """Title and query of each picture, the variables filled in as Grafana does for "All"."""
    return [
        (panel["title"], target["expr"].replace("$instance", ".+").replace("$__rate_interval", "30s"))
        for panel in PAGES[page]["panels"]
        for target in panel["targets"]
    ]


def without_data(prometheus: Prometheus, page: str) -> list[str]:
    """Pictures that are empty, or show nothing but NaN."""
    empty = []
    for title, query in queries(page):
        samples = prometheus.query(query)
        if not [sample for sample in samples if not math.isnan(float(sample["value"][1]))]:
            empty.append(f"{title}: {query}")
    return empty


def empty_pictures(
    prometheus: Prometheus, pages: list[str], leave: str = "no such name", within_s: float = 60
) -> list[str]:
    """What is still without data after `within_s` seconds, or as soon as only queries with `leave` in them are."""
    limit = time.monotonic() + within_s
    while True:
        empty = [line for page in pages for line in without_data(prometheus, page)]
        if not [line for line in empty if leave not in line] or time.monotonic() > limit:
            return empty
        time.sleep(1)


def drive(url: str, spec: RobotSpec, name: str, stop: threading.Event) -> None:
    """A robot that asks without end, tells what it measured, and ends an episode now and then."""
    with NativeClient(url) as client:
        seq = 0
        while not stop.is_set():
            seq += 1
            switched = {"delay": 2, "seam": 0.03}
            message = act(spec, seq, robot=name, episode=f"e{seq // 20}", switched=switched)
            # the critic of the tests reads the value from it: it only falls, and raises an alarm
            message["observation"]["state"] = np.asarray([-0.1 - 0.04 * (seq % 20), 0, 0, 0], np.float32)
            if seq % 20 == 10:
                message["deadline_ms"] = 0.01  # cannot be met
            client.ask(message)
            if seq % 20 == 19:
                client.ask({"type": "outcome", "robot": name, "episode": f"e{seq // 20}", "success": False})
            time.sleep(0.05)


@contextmanager
def robots(url: str, spec: RobotSpec, count: int) -> Iterator[None]:
    stop = threading.Event()
    with ThreadPoolExecutor(count) as pool:
        driven = [pool.submit(drive, url, spec, f"r{n}", stop) for n in range(count)]
        try:
            yield
        finally:
            stop.set()
            for robot in driven:
                robot.result(20)


def change(served: Served, action: str, **options: Any) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}", "Content-Type": "application/json"}
    status, body = fetch(served.http(f"/models/{action}"), data=json.dumps(options).encode(), headers=headers)
    assert status == 200, body


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver(TOKEN)
    yield made
    made.close()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    return path


@pytest.mark.slow
def test_a_slow_engine_pages_somebody_and_every_picture_has_data(
    tmp_path: Path, receiver: Receiver, token: Path
) -> None:
    models = build_repository(tmp_path / "models", models=("policy", "critic"))
    add_version(models, 2, shift=SHIFT)
    (tmp_path / "prometheus").mkdir()
    with ExitStack() as stack:
        critic = stack.enter_context(critic_server(models))
        source = ModelSource(models, admin_key=ADMIN)
        policy = stack.enter_context(
            policy_server(
                models,
                critic_url=critic.url("/value"),
                record=Recording(tmp_path / "served", min_free=0),
                source=source,
            )
        )
        change(policy, "load", version=1, state="shadow", every=2)
        targets = {"recap-policy": policy.port, "recap-critic": critic.port}
        prometheus = stack.enter_context(monitoring(tmp_path / "prometheus", targets, receiver, token))
        stack.enter_context(robots(policy.url(), policy.service.spec.robot, 3))

        eventually(lambda: prometheus.query("job:recap_act_slow:ratio_rate5m >= 0") != [], 60)
        assert receiver.delivered == []
        slow_down(policy)
        (path, alert), *_ = eventually(lambda: receiver.alerts("RecapLatencyBudgetFast"), 120)

        assert path == "/on-call"
        assert alert["labels"]["job"] == "recap-policy"
        assert alert["annotations"]["summary"].startswith("recap-policy: ")
        assert alert["annotations"]["runbook_url"] == "docs/runbook.md#recaplatencybudgetfast"
        assert empty_pictures(prometheus, [page for page in PAGES if page != "recap-triton"]) == []
        assert prometheus.unhealthy() == []


def slow_down(policy: Served) -> None:
    def late(outputs: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.1)
        return outputs

    policy.engine.edit = late


@pytest.mark.slow
def test_a_service_that_stops_is_told_once_and_told_when_it_is_back(
    tmp_path: Path, receiver: Receiver, token: Path
) -> None:
    models = build_repository(tmp_path / "models", models=("policy",))
    (tmp_path / "prometheus").mkdir()
    with ExitStack() as stack:
        with policy_server(models) as first:
            port = first.port
            prometheus = stack.enter_context(
                monitoring(tmp_path / "prometheus", {"recap-policy": port}, receiver, token)
            )
            eventually(lambda: [s for s in prometheus.query("up") if s["value"][1] == "1"], 30)
        (path, alert), *_ = eventually(lambda: receiver.alerts("RecapServiceDown"), 120)
        assert (path, alert["labels"]["instance"]) == ("/on-call", f"127.0.0.1:{port}")
        with policy_server(models, port=port):
            eventually(lambda: receiver.alerts("RecapServiceDown", "resolved"), 180)


@pytest.mark.triton
@pytest.mark.slow
def test_pictures_of_triton_have_data(tmp_path: Path, receiver: Receiver, token: Path) -> None:
    """All but those of GPUs, for there may be none."""
    models = triton_repository(tmp_path / "models", models=("policy",))
    (tmp_path / "prometheus").mkdir()
    with triton(models) as server, ExitStack() as stack:
        prometheus = stack.enter_context(
            monitoring(tmp_path / "prometheus", {"triton": server.metrics}, receiver, token)
        )
        engine = load_policy_engine(models, 1.0, f"triton@{server.url('http')}")
        app = create_app(engine, PolicySettings())
        bound = stack.enter_context(running(app, app.state.limits))
        stack.enter_context(robots(f"ws://127.0.0.1:{bound.port}/act", engine.spec.robot, 2))

        empty = empty_pictures(prometheus, ["recap-triton"], "nv_gpu_")
        assert [line for line in empty if "nv_gpu_" not in line] == []
        assert prometheus.unhealthy() == []
        server.kill()
        (path, alert), *_ = eventually(lambda: receiver.alerts("TritonDown"), 120)
        assert (path, alert["labels"]["job"]) == ("/on-call", "triton")
