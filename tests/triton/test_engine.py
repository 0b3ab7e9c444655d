"""A real Triton, asked in every way, is an engine like the embedded one."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine_laws import LAWS, batch, describes_itself
from services.common import triton_memory
from services.common.engine import Engine, EngineError, load_engine
from services.common.errors import ServiceError
from services.common.repository import open_model
from services.common.triton_api import parse_url
from services.common.triton_connect import connect
from services.common.triton_engine import TritonEngine
from triton_server import Triton, triton_repository

WAYS = ("grpc", "http", "grpc ?shm=off", "http ?shm=off")


def load(models: Path, server: Triton, name: str, way: str = "grpc") -> TritonEngine:
    scheme, _, options = way.partition(" ")
    engine = load_engine(models, name, f"triton@{server.url(scheme, options)}")
    assert isinstance(engine, TritonEngine)
    return engine


@pytest.fixture(scope="module", params=[(name, way) for name in ("policy", "critic") for way in WAYS], ids=str)
def engine(models: Path, server: Triton, request: pytest.FixtureRequest) -> Iterator[Engine]:
    loaded = load(models, server, *request.param)
    yield loaded
    loaded.close()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws_of_engines(engine: Engine, law: Callable[[Engine], None]) -> None:
    law(engine)


def test_it_describes_itself(models: Path, engine: Engine) -> None:
    describes_itself(engine, load_engine(models, engine.name))


def test_parity_with_the_embedded_engine(models: Path, engine: Engine) -> None:
    embedded = load_engine(models, engine.name)
    for count in range(1, 9):
        inputs = batch(engine, count, seed=2)
        ours, theirs = engine.run(inputs), embedded.run(inputs)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
            assert np.abs(ours[name] - theirs[name]).max() <= 1e-5


@pytest.mark.parametrize("way", ["grpc", "http"])
def test_shared_memory_is_used_by_threads_and_left_clean(models: Path, server: Triton, way: str) -> None:
    folder = Path("/dev/shm")
    engine = load(models, server, "policy", way)
    inputs = [batch(engine, 1 + i % 8, seed=i) for i in range(24)]
    wanted = [engine.run(item)["actions"] for item in inputs]
    got: dict[int, np.ndarray] = {}

    def ask(first: int) -> None:
        for i in range(first, 24, 4):
            got[i] = engine.run(inputs[i])["actions"]

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(got) == 24
    for i, actions in got.items():
        np.testing.assert_allclose(actions, wanted[i], atol=1e-6)
    assert engine._slots is not None and 1 <= len(engine._slots.names()) <= 4
    assert not list(folder.glob("recap-*")), "no name is left behind, even while they are in use"
    engine.close()


def test_refused_shared_memory_is_said_once_and_tensors_are_sent(
    models: Path, server: Triton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton_memory, "_FOLDER", tmp_path)  # where Triton, as on another host, does not find it
    engine = load(models, server, "policy")
    for count in (1, 3, 8):
        inputs = batch(engine, count)
        np.testing.assert_allclose(
            engine.run(inputs)["actions"], load_engine(models, "policy").run(inputs)["actions"], atol=1e-5
        )
    assert capsys.readouterr().out.count("no shared memory with Triton") == 1
    assert list(tmp_path.iterdir()) == []
    engine.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_deadline_that_has_passed_is_typed(models: Path, server: Triton, way: str) -> None:
    engine = load(models, server, "policy", way)
    inputs = batch(engine, 8)
    for seconds in (0.0, -1.0, 1e-6):
        with pytest.raises(ServiceError, match="no answer within") as caught:
            engine.run_within(inputs, seconds)
        assert caught.value.fault.code == "deadline"
    assert engine.run_within(inputs, 30.0)["actions"].shape == (8, 8, 4)
    engine.close()


def test_another_model_than_in_the_folder_is_refused(server: Triton, tmp_path: Path) -> None:
    other = triton_repository(tmp_path / "models", models=("policy",), size=32)
    with pytest.raises(
        EngineError, match=r"spec of the model: expected [0-9a-f]{12} .*, got [0-9a-f]{12}; give --models"
    ):
        load(other, server, "policy")


def test_a_version_that_triton_has_not_is_refused(models: Path, server: Triton) -> None:
    model = replace(open_model(models, "policy"), version="7")
    with pytest.raises(EngineError, match=r"policy 7 at grpc://.*: expected a Triton that serves this model, got none"):
        TritonEngine(model, url=server.url("grpc", "?wait=0"))


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_no_triton_at_the_start(models: Path, scheme: str) -> None:
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"got none within 1 s: .*; start it on the repository"):
        load_engine(models, "policy", f"triton@{scheme}://127.0.0.1:9?wait=1")
    assert time.monotonic() - started < 30


def test_metrics_are_scraped(models: Path, server: Triton) -> None:
    engine = load(models, server, "policy")
    before = server.metric("nv_inference_count", model="policy", version="1")
    runs = server.metric("nv_inference_exec_count", model="policy", version="1")
    for _ in range(3):
        engine.run(batch(engine, 4))
    assert server.metric("nv_inference_count", model="policy", version="1") - before == 12
    assert server.metric("nv_inference_exec_count", model="policy", version="1") - runs == 3
    assert server.metric("nv_inference_request_failure", model="policy", version="1", reason="BACKEND") == 0
    engine.close()


def test_the_configuration_that_triton_loaded_is_ours(server: Triton) -> None:
    """Triton drops what it does not know, or fails; every field of ours is in what it says it runs."""
    for scheme in ("grpc", "http"):
        config = connect(parse_url(server.url(scheme))).config("policy", "1", 5.0)
        assert config["backend"] == "python" and int(config["max_batch_size"]) == 8
        batching = config["dynamic_batching"]
        assert [int(n) for n in batching["preferred_batch_size"]] == [2, 4, 8]
        assert int(batching["priority_levels"]) == 2 and batching["default_queue_policy"]["allow_timeout_override"]
        assert [item["name"] for item in config["model_warmup"]] == ["batch 1", "batch 2", "batch 4", "batch 8"]
        limiter = config["instance_group"][0]["rate_limiter"]
        assert limiter["resources"][0]["name"] == "device" and int(limiter["priority"]) == 1
        assert int(config["version_policy"]["latest"]["num_versions"]) == 2
