"""What an exported repository asks of Triton itself: batches, bad requests, queues, turns, the real exporter."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from engine_laws import batch
from exporters.cli import export
from model_factory import save_critic
from recap_model.manifest import verify
from service_harness import eventually
from services.common.engine import Engine, EngineError, load_engine
from services.common.triton_api import Call, Part, TritonError, parse_url, tensors
from services.common.triton_connect import connect
from triton_server import Triton, serve_by_triton, triton, triton_repository

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def picky(tmp_path: Path) -> Iterator[tuple[Path, Triton]]:
    """A policy whose run fails for token ids above 8, as a real one's does beyond its vocabulary."""
    models = triton_repository(tmp_path / "models", models=("policy",))
    path = models / "policy" / "1" / "model.onnx"
    graph = onnx.load(path)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(9, np.float32), "words"))
    output = graph.graph.output[0].name
    for node in graph.graph.node:
        node.output[:] = ["plain" if name == output else name for name in node.output]
    graph.graph.node.extend(
        [
            onnx.helper.make_node("Gather", ["words", "tokens"], ["looked_up"]),
            onnx.helper.make_node("ReduceSum", ["looked_up"], ["nothing"], keepdims=0),
            onnx.helper.make_node("Add", ["plain", "nothing"], [output]),
        ]
    )
    onnx.save(graph, path)
    serve_by_triton(models / "policy")
    with triton(models) as server:
        yield models, server


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_bad_request_fails_without_its_batch_mates(picky: tuple[Path, Triton], scheme: str) -> None:
    models, server = picky
    engine = load_engine(models, "policy", f"triton@{server.url(scheme)}")
    good = [batch(engine, 1, seed=i) for i in range(7)]
    wanted = [engine.run(inputs)["actions"] for inputs in good]
    bad = batch(engine, 1)
    bad["tokens"] = bad["tokens"] + 100
    failures: list[Exception] = []
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(15):
            if number < 7:
                if not np.allclose(engine.run(good[number])["actions"], wanted[number], atol=1e-5):
                    wrong.append(number)
                continue
            try:
                engine.run(bad)
            except EngineError as error:
                failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [] and len(failures) == 15
    assert all("policy 1 at" in str(error) and "indices element out of data bounds" in str(error) for error in failures)
    runs = server.metric("nv_inference_exec_count", model="policy", version="1")
    assert server.metric("nv_inference_count", model="policy", version="1") > runs, "some did share a batch"
    engine.close()


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_the_queue_gives_up_what_is_late(models: Path, server: Triton, scheme: str) -> None:
    """The time that a request has left is told to Triton, which does not run it afterwards."""
    transport = connect(parse_url(server.url(scheme)))
    engine = load_engine(models, "policy", f"triton@{server.url(scheme)}")
    config = transport.config("policy", "1", 10.0)
    inputs = batch(engine, 1)
    given = tuple(Part(tensor, 1, data=inputs[tensor.name]) for tensor in tensors(config, "input"))
    wanted = tuple(Part(tensor, 1) for tensor in tensors(config, "output"))

    def reason(timeout_us: int, priority: int | None) -> str:
        try:
            transport.infer(Call("policy", "1", given, wanted, timeout_us, priority), 10.0)
        except TritonError as error:
            return error.reason
        return "answered"

    with busy(engine):
        for priority in (1, 2, None):
            eventually(partial(lambda p: reason(1, p) == "late", priority), 30.0)
            assert reason(10_000_000, priority) == "answered"
    transport.close()
    engine.close()


@contextmanager
def busy(engine: Engine) -> Iterator[None]:
    """The model always has something to run."""
    stop = threading.Event()

    def ask() -> None:
        inputs = batch(engine, 8)
        while not stop.is_set():
            engine.run(inputs)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)


def test_with_turns_both_models_are_served(models: Path) -> None:
    with triton(models, "--rate-limit=execution_count") as server:
        engines: list[Engine] = [load_engine(models, n, f"triton@{server.url('grpc')}") for n in ("policy", "critic")]
        done = {engine.name: 0 for engine in engines}
        stop = threading.Event()

        def ask(engine: Engine) -> None:
            inputs = batch(engine, 8)
            while not stop.is_set():
                engine.run(inputs)
                done[engine.name] += 1

        threads = [threading.Thread(target=ask, args=(engine,)) for engine in engines for _ in range(3)]
        for thread in threads:
            thread.start()
        stop.wait(5)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert min(done.values()) > 5, f"neither starves: {done}"


def test_the_shipped_models(tmp_path: Path) -> None:
    """Graphs that `recap export` made of trained checkpoints, guided and not: equal to the embedded engine."""
    models = tmp_path / "models"
    shutil.copytree(ROOT / "assets" / "model_repository", models)
    for model in models.iterdir():
        serve_by_triton(model)
    with triton(models) as server:
        for name in ("policy", "policy_guided", "critic"):
            for way in ("http", "grpc", "grpc?shm=off"):
                scheme, _, options = way.partition("?")
                _same_as_embedded(models, name, f"triton@{server.url(scheme, '?' + options if options else '')}")


@pytest.mark.slow
@pytest.mark.timeout(1500)  # torch traces two graphs
def test_the_exporters_repository(tmp_path: Path) -> None:
    """`recap export --backend python`: served, and a second version beside the first."""
    out = tmp_path / "models"
    common = ["--out", str(out), "--backend", "python", "--batch-sizes", "1", "4"]
    assert export([str(save_critic(tmp_path / "critic")), *common]) == 0
    with triton(out, "--model-control-mode=explicit", "--load-model=*") as server:
        _same_as_embedded(out, "critic", f"triton@{server.url('http')}")
        assert export([str(save_critic(tmp_path / "next", seed=1)), *common, "--version", "2"]) == 0
        engine = _same_as_embedded(out, "critic", f"triton@{server.url('grpc')}")
        assert engine.version == "2" and server.get("/v2/models/critic/versions/1/ready") == 200
    for version in ("1", "2"):
        verify(out / "critic" / version, "model")  # Python left no bytecode in it


def _same_as_embedded(models: Path, name: str, kind: str) -> Engine:
    engine, embedded = load_engine(models, name, kind), load_engine(models, name)
    engine.warm_up()
    rng = np.random.default_rng(3)
    for count in range(1, engine.batch_sizes[-1] + 1):
        inputs = batch(engine, count)
        inputs["images"] = rng.integers(0, 256, inputs["images"].shape, np.uint8)
        ours, theirs = engine.run(inputs), embedded.run(inputs)
        assert all(np.abs(ours[key] - theirs[key]).max() <= 1e-5 for key in theirs)
    engine.close()
    return engine
