"""The torch engine: what the checkpoint computes, in batches of any size; and, without a GPU, what a capture needs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from exporters.onnx import export_onnx
from exporters.torch_graph import FILES, TorchGraphError, write_torch
from exporters.wrap import Graph, load_graphs, policy_graph
from model_factory import STATS, save_critic, save_policy
from recap_model.manifest import publish, write_manifest
from recap_model.policy.config import ExpertConfig, LanguageConfig, PolicyConfig, SiglipConfig
from recap_model.policy.load import load_policy, read_policy
from recap_model.policy.model import Policy
from recap_model.policy.static import GraphOptions, StaticPolicy
from recap_model.spec import write_spec
from services.common.engine import Engine, EngineError, load_engine
from services.common.engine_inputs import Input
from services.common.onnxruntime_engine import OnnxRuntimeEngine
from services.common.repository import open_model
from services.common.torch_engine import TorchEngine, _Captured, _Plain, describe

OPTIONS = {
    "policy": GraphOptions(),
    "policy_guided": GraphOptions(guided=True),
    "policy_rtc": GraphOptions(rtc=True),
    "policy_both": GraphOptions(guided=True, rtc=True),
}
EXPORTED = ("policy", "policy_guided", "policy_rtc")  # as ONNX too
SMOLVLA = PolicyConfig(
    SiglipConfig(image_size=64, width=32, layers=2, heads=2, intermediate=48, shuffle=2),
    LanguageConfig(width=48, layers=4, heads=4, kv_heads=2, head_dim=16, intermediate=64, vocabulary=24),
    ExpertConfig(width=36, intermediate=64), cameras=2, state_dim=3, action_dim=4, chunk=8, max_tokens=16,
    denoise_steps=3, frame=(64, 64), image_tokens=(3, 4), empty_cameras=1,
)  # fmt: skip
BF16_ERROR = 0.02  # largest, in action units, where the actions' spread is about 0.5


def write_model(models: Path, graph: Graph, *, onnx: bool = False, **parameters: Any) -> None:
    """A version folder with what the torch engine needs, and onnxruntime's graph if asked."""
    with publish(models / graph.name) as folder:
        version = folder / "1"
        version.mkdir()
        write_torch(graph, version)
        if onnx:
            export_onnx(graph, version / "model.onnx")
        write_spec(graph.files.spec, version / "spec.json")
        graph.files.tokenizer.save(version / "tokenizer.json")
        write_manifest(version, "model", parents={"checkpoint": graph.files.manifest.hash}, parameters=parameters)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("checkpoint") / "policy")


@pytest.fixture(scope="module")
def graphs(checkpoint: Path) -> dict[str, Graph]:
    policy, files = load_policy(checkpoint)
    return {name: policy_graph(name, policy, options, files) for name, options in OPTIONS.items()}


@pytest.fixture(scope="module")
def models(graphs: dict[str, Graph], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for graph in graphs.values():
        write_model(folder, graph, onnx=graph.name in EXPORTED)
    return folder


@pytest.fixture(scope="module", params=EXPORTED)
def case(request: Any, models: Path, graphs: dict[str, Graph]) -> Iterator[tuple[Graph, TorchEngine]]:
    engine = TorchEngine(open_model(models, request.param), device="cpu")
    yield graphs[request.param], engine
    engine.close()


def plain(models: Path, **options: Any) -> TorchEngine:
    return TorchEngine(open_model(models, "policy"), device="cpu", **options)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_sample_equals_the_checkpoint_and_onnxruntime(case: Any, models: Path, count: int) -> None:
    """3 is padded to 4. The reference is `Policy`, and for chunking the fp32 graph with written-out attention."""
    graph, engine = case
    inputs = graph.example(count, 11)
    actions = engine.run(inputs)["actions"]
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, graph.run(inputs)["actions"], atol=1e-4)
    other = OnnxRuntimeEngine(open_model(models, graph.name), batch_sizes=(4,) if count == 3 else (count,))
    np.testing.assert_allclose(actions, other.run(inputs)["actions"], atol=1e-4)
    assert np.abs(actions).max() > 0.1


def test_a_sample_does_not_depend_on_its_neighbours_or_on_earlier_runs(case: Any) -> None:
    graph, engine = case
    inputs = graph.example(3, 5)
    together = engine.run(inputs)["actions"]
    engine.run(graph.example(8, 6))
    for i in range(3):
        alone = engine.run({name: x[i : i + 1] for name, x in inputs.items()})["actions"]
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


def test_an_answer_is_the_callers_own(models: Path, graphs: dict[str, Graph]) -> None:
    engine, graph = plain(models), graphs["policy"]
    first = engine.run(graph.example(2, 0))["actions"]
    kept = first.copy()
    engine.run(graph.example(2, 1))
    np.testing.assert_array_equal(first, kept)
    first[:] = 0
    assert first.flags.owndata


def test_inputs_are_those_of_the_exported_graph(case: Any, models: Path) -> None:
    graph, engine = case
    other = OnnxRuntimeEngine(open_model(models, graph.name), batch_sizes=(1,))
    assert engine.input_names == other.input_names == graph.inputs
    assert engine.input_shapes == other.input_shapes
    dtypes = {name: item.dtype for name, item in describe(graph.module.config, graph.module.options).items()}
    assert dtypes == {name: x.dtype for name, x in graph.example(1, 0).items()}


def test_padding_repeats_the_last_sample(models: Path, graphs: dict[str, Graph]) -> None:
    engine = plain(models)
    inputs = graphs["policy"].example(3, 2)
    engine.run(inputs)
    assert engine._runner is not None
    for name, staged in engine._runner.inputs.items():
        np.testing.assert_array_equal(staged[:3].numpy(), inputs[name])
        np.testing.assert_array_equal(staged[3].numpy(), inputs[name][2])


def test_bf16_stays_within_its_error(models: Path, graphs: dict[str, Graph]) -> None:
    engine, inputs = plain(models, dtype=torch.bfloat16), graphs["policy"].example(3, 4)
    assert engine.dtype == torch.bfloat16
    difference = np.abs(engine.run(inputs)["actions"] - graphs["policy"].run(inputs)["actions"]).max()
    assert 1e-5 < difference < BF16_ERROR


def test_it_is_an_engine_loaded_by_name(models: Path) -> None:
    engine: Engine = load_engine(models, "policy", "torch")
    assert isinstance(engine, TorchEngine)
    same = load_engine(models, "policy")
    assert (engine.name, engine.version, engine.hash) == (same.name, same.version, same.hash)
    assert engine.spec == same.spec
    assert engine.batch_sizes == (1, 2, 4, 8)
    engine.warm_up()
    engine.close()
    with pytest.raises(EngineError, match=r"after close\(\)"):
        engine.warm_up()


def test_defaults_on_the_cpu(models: Path) -> None:
    engine = plain(models)
    assert (engine.device, engine.dtype) == (torch.device("cpu"), torch.float32)
    assert isinstance(engine._runner, _Plain)


def test_batch_sizes_come_from_the_manifest(graphs: dict[str, Graph], tmp_path: Path) -> None:
    write_model(tmp_path, graphs["policy"], batch_sizes=[3, 1])
    engine = plain(tmp_path)
    assert engine.batch_sizes == (1, 3)
    with pytest.raises(EngineError, match="at most 3 samples, got 4"):
        engine.run(graphs["policy"].example(4, 0))
    write_model(tmp_path, graphs["policy"], batch_sizes=[0])
    with pytest.raises(EngineError, match="batch_sizes: expected positive"):
        plain(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"images": np.zeros((1, 2, 64, 64, 3), np.float32)}, ["input images", "uint8", "float32"]),
        ({"images": np.zeros((1, 2, 32, 64, 3), np.uint8)}, ["images", "2, 64, 64, 3", "2, 32, 64, 3"]),
        ({"state": np.zeros((2, 3), np.float32)}, ["batch", "[1, 2]"]),
        ({"noise": None}, ["inputs", "noise"]),
        ({"tokens": np.full((1, 16), 24, np.int32)}, ["input tokens", "[0, 24)", "got 24 to 24", "tokenizer"]),
        ({"tokens": np.full((1, 16), -1, np.int32)}, ["input tokens", "got -1 to -1"]),
    ],
)
def test_wrong_inputs_are_named(models: Path, graphs: dict[str, Graph], change: Any, words: list[str]) -> None:
    inputs = {k: v for k, v in (graphs["policy"].example(1, 0) | change).items() if v is not None}
    with pytest.raises(EngineError) as error:
        plain(models).run(inputs)
    assert all(word in str(error.value) for word in words), error.value


def test_missing_and_damaged_folders_are_named(graphs: dict[str, Graph], tmp_path: Path) -> None:
    for name in ("graph.json", *FILES):
        write_model(tmp_path, graphs["policy"])
        version = tmp_path / "policy" / "1"
        (version / name).unlink()
        write_manifest(version, "model")
        with pytest.raises(EngineError, match=f"got no {name}; export with .*--target torch"):
            plain(tmp_path)
    write_model(tmp_path, graphs["policy"])
    for name, text, words in (
        ("graph.json", '{"guided": 1}', "expected true or false"),
        ("config.json", "{}", "cannot load it"),
        ("model.safetensors", "", "expected a safetensors file"),
    ):
        (version / name).write_text(text)
        write_manifest(version, "model")
        with pytest.raises(EngineError, match=words):
            plain(tmp_path)
        write_torch(graphs["policy"], version)


def test_devices_that_are_not_there_are_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="expected a GPU that torch sees, got none for 'cuda:1'"):
        TorchEngine(open_model(models, "policy"), device="cuda:1")
    with pytest.raises(EngineError, match="got 'meta'"):
        TorchEngine(open_model(models, "policy"), device="meta")


def test_written_files_are_the_checkpoints(checkpoint: Path, graphs: dict[str, Graph], tmp_path: Path) -> None:
    write_torch(graphs["policy_both"], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*FILES, "graph.json"])
    assert all((tmp_path / name).read_bytes() == (checkpoint / name).read_bytes() for name in FILES)
    assert json.loads((tmp_path / "graph.json").read_text()) == {"guided": True, "rtc": True}
    expected, _ = load_policy(checkpoint)
    for a, b in zip(expected.state_dict().values(), read_policy(tmp_path).state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_critic_is_refused(tmp_path: Path) -> None:
    (graph,) = load_graphs(save_critic(tmp_path / "critic"), guided=False)
    with pytest.raises(TorchGraphError, match=r"expected a policy, got Critic.*--target onnx"):
        write_torch(graph, tmp_path)
    assert not (tmp_path / "graph.json").exists()


class OnDeviceOnly(TorchDispatchMode):
    """Every operator reads and makes CUDA tensors alone, and none tells the host a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        places = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        assert places <= {"cuda"}, f"{func} touches {places}"
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), f"{func} waits for the GPU"
        return result


def pretend_cuda(module: torch.nn.Module) -> None:
    """Replace every parameter and buffer by one that pretends to be on a GPU (inside FakeTensorMode)."""
    for owner in module.modules():
        for name, value in owner._parameters.items():
            owner._parameters[name] = value if value is None else torch.nn.Parameter(on_cuda(value), False)
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = buffer if buffer is None else on_cuda(buffer)


def on_cuda(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cuda")


@pytest.mark.parametrize("tower", ["conv", "siglip"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_graph_can_be_captured(graphs: dict[str, Graph], name: str, tower: str) -> None:
    """Run on tensors that only pretend to be on a GPU: no host tensor, no read-back, the code paths of CUDA."""
    policy = Policy(SMOLVLA, STATS) if tower == "siglip" else load_policy(graphs[name].files.path)[0]
    options = replace(OPTIONS[name], dtype=torch.bfloat16, attention="sdpa")
    inputs = [torch.from_numpy(x) for x in graphs[name].example(4, 0).values()]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        static = StaticPolicy(policy, options)
        pretend_cuda(static)
        staged = [on_cuda(x) for x in inputs]
        with OnDeviceOnly() as watch:
            actions = static(*staged)
    assert watch.count > 100
    assert (tuple(actions.shape), actions.dtype, actions.device.type) == ((4, 8, 4), torch.float32, "cuda")


def test_the_watch_can_fail() -> None:
    with FakeTensorMode(), pytest.raises(AssertionError, match="touches"), OnDeviceOnly():
        torch.empty(2, device="cuda") + torch.zeros((), device="cpu")


def test_compiled_parts_are_whole_graphs(
    models: Path, graphs: dict[str, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile traces both parts without a break, and does so once per batch size for all steps."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    counter, real = CompileCounter(), torch.compile
    asked: list[dict[str, Any]] = []

    def traced(function: Any, **options: Any) -> Any:
        asked.append(options)
        return real(function, backend=counter, dynamic=options["dynamic"], fullgraph=options["fullgraph"])

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    graph = graphs["policy_both"]
    engine = TorchEngine(open_model(models, graph.name), device="cpu", compile=True)
    for count in (1, 2, 3, 2, 1):
        inputs = graph.example(count, 3)
        np.testing.assert_allclose(engine.run(inputs)["actions"], graph.run(inputs)["actions"], atol=1e-4)
    assert counter.frame_count == 2 * 3
    assert [options["options"] for options in asked] == [{"triton.cudagraphs": False}] * 2
    torch._dynamo.reset()


class PretendCuda:
    """`torch.cuda` as far as a capture needs it, on the CPU: a graph is the last call made while it was captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.last: Any = None
        self.stream = SimpleNamespace(
            wait_stream=lambda _: self.calls.append("wait"), synchronize=lambda: self.calls.append("synchronize")
        )
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self.stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.make)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.clone())

    def module(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls.append(("module", len(x)))
        self.last = (x, y, x.float() + y)
        return self.last[2]  # type: ignore[no-any-return]

    def make(self) -> Any:
        graph = SimpleNamespace(pool=lambda: "pool")
        graph.replay = lambda: graph.out.copy_(graph.x.float() + graph.y)
        return graph

    @contextmanager
    def capture(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert stream is self.stream
        self.calls.append(("capture", pool, capture_error_mode))
        yield
        graph.x, graph.y, graph.out = self.last


def test_captures_largest_first_and_answers_from_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bookkeeping of the captured path; CUDA itself is `test_captured_equals_plain_on_a_gpu`."""
    cuda = PretendCuda(monkeypatch)
    wanted = {"x": Input(np.dtype(np.uint8), (3,)), "y": Input(np.dtype(np.float32), (3,))}
    module: Any = cuda.module
    runner = _Captured(module, wanted, (1, 2, 4), torch.device("cpu"))
    expected: list[Any] = ["wait"]
    for size, pool in ((4, None), (2, "pool"), (1, "pool")):
        expected += [("module", size)] * 3 + ["synchronize", ("capture", pool, "thread_local"), ("module", size)]
    assert cuda.calls == expected
    cuda.calls.clear()
    for size in (4, 1, 2, 4):
        runner.inputs["x"][:size], runner.inputs["y"][:size] = size, torch.arange(3.0)
        answer = runner.run(size)
        np.testing.assert_array_equal(answer.numpy(), np.tile(size + np.arange(3.0, dtype=np.float32), (size, 1)))
    assert cuda.calls == ["synchronize"] * 4, "one wait per run, and nothing computed outside the graphs"


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-3), (torch.bfloat16, 2 * BF16_ERROR)])
def test_captured_equals_plain_on_a_gpu(
    models: Path, graphs: dict[str, Graph], name: str, compiled: bool, dtype: torch.dtype, atol: float
) -> None:
    """Every batch size, in an order that would show graphs overwriting each other, against the uncaptured module."""
    graph, folder = graphs[name], open_model(models, name)
    engine = TorchEngine(folder, device="cuda", dtype=dtype, compile=compiled)
    engine.warm_up()
    options = replace(OPTIONS[name], dtype=dtype, attention="sdpa")
    static = StaticPolicy(load_policy(graph.files.path)[0], options).cuda()
    for count in (8, 1, 3, 2, 5, 1, 4, 8):
        inputs = graph.example(count, count)
        runner = _Plain(static, describe(static.config, static.options), (count,), torch.device("cuda"))
        for key, value in inputs.items():
            runner.inputs[key].copy_(torch.from_numpy(value))
        actions = engine.run(inputs)["actions"]
        np.testing.assert_allclose(actions, runner.run(count).numpy(), atol=atol)
        np.testing.assert_array_equal(actions, engine.run(inputs)["actions"])
    engine.close()
