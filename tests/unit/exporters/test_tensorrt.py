"""The TensorRT builder up to the library's boundary: a stand-in records what is asked of it, in order."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from exporters.tensorrt import TensorRtError, build_plan, require_fitting, this_machine

HERE = {"tensorrt": "11.4.0", "gpu": "NVIDIA H100", "compute_capability": "9.0"}
INPUTS = {"images": (-1, 2, 64, 64, 3), "state": (-1, 3), "beta": (-1,)}


class Recorder(ModuleType):
    """The part of `tensorrt` that a build calls. Attributes steer what it answers; `calls` is what it was asked."""

    __version__ = HERE["tensorrt"]

    def __init__(self) -> None:
        super().__init__("tensorrt")
        self.calls: list[tuple[Any, ...]] = []
        self.errors: list[str] = []
        self.inputs = dict(INPUTS)
        self.plan: bytes | None = b"plan"
        self.accepts = True  # profiles
        self.stale: bytes | None = None  # a timing cache that is refused
        severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)
        self.ILogger = type("ILogger", (), {"Severity": severity})
        self.Builder, self.OnnxParser = self._builder, self._parser

    def note(self, *call: Any) -> None:
        self.calls.append(call)

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def _builder(self, logger: Any) -> Any:
        logger.log(3, "chatter")
        logger.log(2, "beware")
        items = [SimpleNamespace(name=name, shape=shape) for name, shape in self.inputs.items()]
        network = SimpleNamespace(num_inputs=len(items), get_input=lambda i: items[i])

        def create_network(flags: int) -> Any:
            self.note("create_network", flags)
            return network

        def build(got: Any, config: Any) -> bytes | None:
            assert got is network
            assert config is self.config
            self.note("build")
            return self.plan

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=self._config,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *a: self.note("set_shape", *a)),
            build_serialized_network=build,
        )

    def _parser(self, _network: Any, _logger: Any) -> Any:
        def parse(path: str) -> bool:
            self.note("parse", path)
            return not self.errors

        return SimpleNamespace(
            parse_from_file=parse, num_errors=len(self.errors), get_error=lambda i: SimpleError(self.errors[i])
        )

    def _config(self) -> Any:
        def add(_: Any) -> int:
            self.note("add_profile")
            return self.names().count("add_profile") - 1 if self.accepts else -1

        def set_cache(cache: bytes, ignore_mismatch: bool) -> bool:
            self.note("set_timing_cache", cache, ignore_mismatch)
            return self.stale is None or cache != self.stale

        self.config = SimpleNamespace(
            add_optimization_profile=add,
            create_timing_cache=lambda data: data,
            set_timing_cache=set_cache,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timings"),
        )
        return self.config


class SimpleError:
    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "tensorrt", recorder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: HERE["gpu"])
    return recorder


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"graph")
    return path


def test_order_arguments_and_what_is_recorded(trt: Recorder, onnx: Path) -> None:
    lines: list[str] = []
    plan = onnx.with_name("model.plan")
    recorded = build_plan(onnx, plan, profiles=((1, 1, 8), (1, 4, 4)), log=lines.append)
    shapes = [
        ("set_shape", name, (low, *shape[1:]), (opt, *shape[1:]), (high, *shape[1:]))
        for low, opt, high in ((1, 1, 8), (1, 4, 4))
        for name, shape in INPUTS.items()
    ]
    assert trt.calls == [
        ("create_network", 0),
        ("parse", str(onnx)),
        *shapes[:3],
        ("add_profile",),
        *shapes[3:],
        ("add_profile",),
        ("build",),
    ]
    assert plan.read_bytes() == b"plan"
    assert recorded == {**HERE, "profiles": [[1, 1, 8], [1, 4, 4]]}
    assert lines == ["tensorrt: beware"]
    require_fitting(recorded, this_machine())


def test_tensorrt_10_is_asked_for_strong_types(trt: Recorder, onnx: Path) -> None:
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    build_plan(onnx, onnx.with_name("model.plan"))
    assert trt.calls[0] == ("create_network", 2)


def test_timing_cache_is_read_before_and_written_after(trt: Recorder, onnx: Path) -> None:
    cache = onnx.with_name("timing.cache")
    for before in (b"", b"timings"):
        trt.calls.clear()
        build_plan(onnx, onnx.with_name("model.plan"), timing_cache=cache)
        assert trt.calls[-2:] == [("set_timing_cache", before, False), ("build",)]
        assert cache.read_bytes() == b"timings"


def test_a_stale_timing_cache_is_left_aside(trt: Recorder, onnx: Path) -> None:
    cache, lines = onnx.with_name("timing.cache"), []
    cache.write_bytes(b"old")
    trt.stale = b"old"
    build_plan(onnx, onnx.with_name("model.plan"), timing_cache=cache, log=lines.append)
    assert [call[1] for call in trt.calls if call[0] == "set_timing_cache"] == [b"old", b""]
    assert any("timing cache of another machine" in line for line in lines)
    assert cache.read_bytes() == b"timings"


def test_a_failed_build_touches_nothing(trt: Recorder, onnx: Path) -> None:
    plan, cache = onnx.with_name("model.plan"), onnx.with_name("timing.cache")
    plan.write_bytes(b"before")
    trt.plan = None
    with pytest.raises(TensorRtError, match=r"expected a plan from TensorRT 11\.4\.0 on NVIDIA H100, got none"):
        build_plan(onnx, plan, timing_cache=cache)
    assert plan.read_bytes() == b"before"
    assert sorted(p.name for p in onnx.parent.iterdir()) == ["model.onnx", "model.plan"]


@pytest.mark.usefixtures("trt")
def test_an_interrupted_write_leaves_the_old_plan(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = onnx.with_name("model.plan")
    plan.write_bytes(b"before")

    def full(_: Path, __: bytes) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        build_plan(onnx, plan)
    assert plan.read_bytes() == b"before"
    assert sorted(p.name for p in onnx.parent.iterdir()) == ["model.onnx", "model.plan"]


def test_all_parser_errors_are_told(trt: Recorder, onnx: Path) -> None:
    trt.errors = ["node 3: no ScatterND", "node 9: fp64"]
    with pytest.raises(TensorRtError, match="2 errors: node 3: no ScatterND; node 9: fp64"):
        build_plan(onnx, onnx.with_name("model.plan"))
    assert trt.names() == ["create_network", "parse"]


@pytest.mark.parametrize("shape", [(1, 3), (-1, -1), ()])
def test_an_input_without_one_symbolic_batch_is_named(trt: Recorder, onnx: Path, shape: tuple[int, ...]) -> None:
    trt.inputs["state"] = shape
    with pytest.raises(TensorRtError, match="input state: expected a symbolic batch first"):
        build_plan(onnx, onnx.with_name("model.plan"))


def test_a_refused_profile_is_named(trt: Recorder, onnx: Path) -> None:
    trt.accepts = False
    with pytest.raises(TensorRtError, match=r"profile \(1, 1, 8\)"):
        build_plan(onnx, onnx.with_name("model.plan"))
    assert "build" not in trt.names()


@pytest.mark.parametrize("profiles", [(), ((0, 1, 8),), ((2, 1, 8),), ((1, 9, 8),)])
def test_profiles_out_of_order_are_refused_first(trt: Recorder, onnx: Path, profiles: Any) -> None:
    with pytest.raises(TensorRtError, match="1 <= min <= opt <= max"):
        build_plan(onnx, onnx.with_name("model.plan"), profiles=profiles)
    assert trt.calls == []


@pytest.mark.usefixtures("trt")
def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(TensorRtError, match=r"absent\.onnx: expected an ONNX file"):
        build_plan(tmp_path / "absent.onnx", tmp_path / "model.plan")


def test_without_the_library_the_message_says_how_to_get_it(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(TensorRtError, match="pip install tensorrt"):
        build_plan(onnx, onnx.with_name("model.plan"))


@pytest.mark.usefixtures("trt")
def test_without_a_gpu_nothing_is_built(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TensorRtError, match="expected a GPU"):
        build_plan(onnx, onnx.with_name("model.plan"))


@pytest.mark.parametrize(
    "change", [{"tensorrt": "11.3.0"}, {"gpu": "NVIDIA L4", "compute_capability": "8.9"}, {"gpu": "NVIDIA H200"}]
)
def test_a_plan_of_another_machine_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(TensorRtError) as error:
        require_fitting(HERE | change, HERE)
    words = [f"{k}: expected {v} (plan), got {HERE[k]} (this machine)" for k, v in change.items()]
    assert all(word in str(error.value) for word in [*words, "recap export CHECKPOINT --target tensorrt --out"])


def test_a_plan_that_records_nothing_is_refused() -> None:
    with pytest.raises(TensorRtError, match="nothing recorded"):
        require_fitting({}, HERE)
