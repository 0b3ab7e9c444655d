"""A new version, and back to the old one, while eight robots are served: nobody notices but by the actions."""

import json
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from recap_client.spec import RobotSpec
from recap_model.manifest import publish, write_manifest
from recap_model.spec import read_spec, write_spec
from repository_factory import TASKS, word_tokenizer
from service_harness import NativeClient, act, eventually, fetch
from services.common.server import running
from services.common.settings import ModelSource, PolicySettings
from services.policy.app import create_app
from services.policy.pipeline import load_policy_engine
from triton_server import Triton, serve_by_triton, triton, triton_repository

KEY = "k" * 32


def add_version(model: Path, number: int, shift: float) -> None:
    """The same policy, whose actions are `shift` larger; the repository is then as after `recap export --version`."""
    graph = onnx.load(model / "1" / "model.onnx")
    output = graph.graph.output[0].name
    for node in graph.graph.node:
        node.output[:] = ["unshifted" if name == output else name for name in node.output]
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(shift, np.float32), "shift"))
    graph.graph.node.append(onnx.helper.make_node("Add", ["unshifted", "shift"], [output]))
    with publish(model / str(number)) as version:
        onnx.save(graph, version / "model.onnx")
        spec = read_spec(model / "1" / "spec.json")
        write_spec(spec, version / "spec.json")
        word_tokenizer(TASKS, spec.max_tokens).save(version / "tokenizer.json")
        (version / "parity.json").write_text("{}\n")
        write_manifest(version, "model")
    serve_by_triton(model)


class Robots:
    """Eight sessions that ask without a pause and keep every answer."""

    def __init__(self, url: str) -> None:
        self.replies: list[list[Any]] = [[] for _ in range(8)]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._live, args=(url, i)) for i in range(8)]

    def __enter__(self) -> "Robots":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _live(self, url: str, i: int) -> None:
        with NativeClient(url) as client:
            spec, seq = RobotSpec.from_json(client.welcome["spec"]["robot"]), 0
            while not self._stop.is_set():
                seq += 1
                message = act(spec, seq, robot=f"r{i}", seed=7, deadline_ms=10_000.0)
                message["seq"] = 1  # with the same seed and number, only the model can change the actions
                self.replies[i].append(client.ask(message))
                time.sleep(0.02)

    def settled(self, shift: float, first: float) -> bool:
        return all(len(r) > 3 and all(abs(_first(x) - first - shift) < 1e-4 for x in r[-3:]) for r in self.replies)

    def count(self) -> int:
        return sum(map(len, self.replies))


def _first(reply: Any) -> float:
    return float(reply["actions"][0, 0]) if "actions" in reply else float("nan")


@pytest.mark.parametrize("way", ["grpc", "http", "grpc ?shm=off"])
def test_rolling_update_and_rollback(tmp_path: Path, way: str) -> None:
    scheme, _, options = way.partition(" ")
    models = triton_repository(tmp_path / "models", models=("policy",))
    with ExitStack() as stack:
        server: Triton = stack.enter_context(triton(models, "--model-control-mode=explicit", "--load-model=*"))
        kind = f"triton@{server.url(scheme, options)}"
        source = ModelSource(models, kind, admin_key=KEY)
        app = create_app(load_policy_engine(models, 1.0, kind), PolicySettings(limits="pass", source=source))
        service = stack.enter_context(running(app, app.state.limits))
        robots = stack.enter_context(Robots(f"ws://127.0.0.1:{service.port}/act"))
        eventually(lambda: all(len(replies) > 5 for replies in robots.replies), 60.0)
        first = _first(robots.replies[0][-1])

        add_version(models / "policy", 2, 0.25)
        listing = change(service.port, "load", {"state": "live", "version": 2, "force": True})
        assert listing["live"]["version"] == "2" and listing["previous"]["version"] == "1"
        eventually(lambda: robots.settled(0.25, first), 30.0)
        assert server.get("/v2/models/policy/versions/1/ready") == 200, "kept for the way back"

        assert change(service.port, "rollback", {})["live"]["version"] == "1"
        eventually(lambda: robots.settled(0.0, first), 30.0)
    answers = [reply for replies in robots.replies for reply in replies]
    assert [reply for reply in answers if reply.get("type") != "chunk"] == []
    seen = {round((_first(reply) - first) / 0.25, 3) for reply in answers}
    assert seen == {0.0, 1.0}, "every answer is of one of the two models"


def change(port: int, action: str, body: dict[str, Any]) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port}/models/{action}"
    status, text = fetch(url, data=json.dumps(body).encode(), headers={"Authorization": f"Bearer {KEY}"})
    assert status == 200, text
    listing: dict[str, Any] = json.loads(text)
    return listing
