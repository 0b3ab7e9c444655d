"""config.pbtxt for every backend, parsed back with Triton's own messages, and what stands beside it."""

import hashlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from exporters.repository import ExportOptions
from exporters.triton_config import Backend, TritonOptions, config_pbtxt, warm_up_files
from exporters.triton_repository import identities, require_same_tensors
from repository_factory import build_repository
from services.common.repository import open_model
from services.common.triton_engine import identity
from triton_server import serve_by_triton

INPUTS = {
    "images": np.zeros((1, 2, 8, 8, 3), np.uint8),
    "tokens": np.arange(1, 6, dtype=np.int32)[None],
    "token_mask": np.ones((1, 5), np.bool_),
    "beta": np.ones(1, np.float32),
}
OUTPUTS = {"value": np.zeros(1, np.float32), "probabilities": np.zeros((1, 201), np.float32)}
SIZES = (1, 2, 4, 8)


def parsed(name: str, options: TritonOptions, **more: Any) -> Any:
    text = config_pbtxt(name, INPUTS, OUTPUTS, 8, options, batch_sizes=SIZES, warm_up=True, **more)
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize("backend", get_args(Backend))
@pytest.mark.parametrize("version", ["2.51", "2.52.0", "2.73"])
def test_every_backend_and_version(backend: Backend, version: str) -> None:
    config = parsed(
        "policy", TritonOptions(backend, version, instances=2, threads=3), parameters={"recap.1.spec": "ab"}
    )
    assert (config.backend, config.max_batch_size) == (backend, 8)
    assert {item.name: tuple(item.dims) for item in config.input} == {
        "images": (2, 8, 8, 3), "tokens": (5,), "token_mask": (5,), "beta": (1,),
    }  # fmt: skip
    assert [item.name for item in (*config.input, *config.output) if item.HasField("reshape")] == ["beta", "value"]
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    queue = config.dynamic_batching.default_queue_policy
    assert queue.allow_timeout_override and queue.default_timeout_microseconds == 60e6 and queue.timeout_action == 0
    assert config.version_policy.latest.num_versions == 2
    group = config.instance_group[0]
    assert group.count == 2 and (group.kind == group.KIND_GPU) == (backend == "tensorrt")
    threads = {"python": "threads", "onnxruntime": "intra_op_thread_count"}.get(backend)
    wanted = {"recap.1.spec": "ab", "batch_sizes": "1,2,4,8"} | ({threads: "3"} if threads else {})
    assert {key: value.string_value for key, value in config.parameters.items()} == wanted
    assert config.HasField("model_metrics") == (version != "2.51")


def test_the_critic_yields_to_the_policy() -> None:
    limits = [parsed(n, TritonOptions()).instance_group[0].rate_limiter for n in ("policy", "policy_guided", "critic")]
    assert [limit.priority for limit in limits] == [1, 1, 10]  # Triton's: chances in inverse proportion
    assert {(item.name, getattr(item, "global"), item.count) for limit in limits for item in limit.resources} == {
        ("device", True, 1)
    }


def test_warm_up_runs_every_size_with_values_that_models_can_take() -> None:
    config = parsed("policy", TritonOptions("python"))
    assert [warm.batch_size for warm in config.model_warmup] == list(SIZES)
    files = warm_up_files(INPUTS)
    assert files == {"tokens": INPUTS["tokens"].tobytes(), "token_mask": INPUTS["token_mask"].tobytes()}
    for warm in config.model_warmup:
        assert set(warm.inputs) == set(INPUTS)
        assert {name for name, value in warm.inputs.items() if value.input_data_file == name} == set(files)
        assert {name for name, value in warm.inputs.items() if value.zero_data} == set(INPUTS) - set(files)


@pytest.mark.parametrize("version", ["24.10", "2", "2.x", "3.1", "", "2.51; drop"])
def test_a_version_is_the_servers_own(version: str) -> None:
    with pytest.raises(ValueError, match=r"triton_version: expected the server's own version, such as 2\.51"):
        TritonOptions(version=version)


@pytest.mark.parametrize(
    "target, triton, words",
    [
        ("onnx", TritonOptions("tensorrt"), "expected one of onnxruntime, python for --target onnx, got tensorrt"),
        ("tensorrt", TritonOptions("python"), "expected one of tensorrt for --target tensorrt, got python"),
        ("torch", TritonOptions("python"), "target torch: expected no options for Triton"),
    ],
)
def test_backends_that_do_not_run_a_target(target: Any, triton: TritonOptions, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExportOptions(target, triton=triton)


def test_services_and_exporter_agree_on_identities(tmp_path: Path) -> None:
    """They must not import each other, and each spells the names and hashes for itself."""
    model = build_repository(tmp_path, models=("policy",)) / "policy"
    serve_by_triton(model)
    told = text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()).parameters
    wanted = {f"recap.1.{part}": value for part, value in identity(open_model(tmp_path, "policy")).items()}
    assert wanted == identities(model) == {key: told[key].string_value for key in wanted}
    assert wanted["recap.1.spec"] == hashlib.sha256((model / "1" / "spec.json").read_bytes()).hexdigest()


def test_all_versions_have_one_configuration(tmp_path: Path) -> None:
    require_same_tensors(tmp_path, INPUTS, OUTPUTS)  # nothing there yet
    (tmp_path / "config.pbtxt").write_text(config_pbtxt("policy", INPUTS, OUTPUTS, 8))
    require_same_tensors(tmp_path, INPUTS, OUTPUTS)
    other = {name: array for name, array in INPUTS.items() if name != "beta"}
    with pytest.raises(
        ValueError, match=r'expected a version with the inputs and outputs of the others.* name: "beta"'
    ):
        require_same_tensors(tmp_path, other, OUTPUTS)


def test_the_python_model_stands_alone() -> None:
    """It imports what the stub's Python has, and the module that the stub brings, by name."""
    from exporters import triton_model

    text = Path(triton_model.__file__).read_text()
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"ctypes", "importlib", "json", "shutil", "pathlib", "typing", "numpy", "onnxruntime"}
