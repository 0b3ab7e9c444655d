"""`config.pbtxt` for a graph: generated text, parsed back in a test."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Backend = Literal["onnxruntime", "tensorrt", "python"]
Arrays = Mapping[str, NDArray[Any]]

WARM_UP_FOLDER = "warmup"

_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "int32": "TYPE_INT32", "bool": "TYPE_BOOL"}
_SINCE = {"model_metrics": (2, 52)}  # an older Triton does not load a model whose configuration has the field
_BUCKETS_MS = (1, 2, 5, 8, 10, 15, 20, 25, 33, 40, 50, 66, 100, 150, 250, 500, 1000)
_KEPT_VERSIONS = 2  # the live one, and the one to go back to
_QUEUE = 64  # requests; more waiting means that nobody will be in time
_PATIENCE_US = 60_000_000  # requests can only shorten this: without a default, Triton ignores what they say


@dataclass(frozen=True)
class TritonOptions:
    """backend: what runs the model inside Triton. version: the oldest Triton that has to read the configuration, such
    as "2.51". instances: copies of the model, each of which runs a batch at a time. threads: CPU threads of each."""

    backend: Backend = "onnxruntime"
    version: str = "2.51"
    instances: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        if re.fullmatch(r"2\.\d{1,3}(\.\d+)?", self.version) is None:
            raise ValueError(
                f"triton_version: expected the server's own version, such as 2.51 (its container is called 24.10), "
                f"got {self.version!r}"
            )
        if self.instances < 1 or self.threads < 1:
            raise ValueError(f"instances, threads: expected at least 1, got {self.instances} and {self.threads}")

    def allows(self, field: str) -> bool:
        """May the configuration have this field?"""
        major, minor = (int(part) for part in self.version.split(".")[:2])
        return (major, minor) >= _SINCE[field]


def config_pbtxt(
    name: str,
    inputs: Arrays,
    outputs: Arrays,
    max_batch: int,
    options: TritonOptions | None = None,
    *,
    batch_sizes: Sequence[int] = (),
    parameters: Mapping[str, str] | None = None,
    warm_up: bool = False,
) -> str:
    """Triton model configuration; arrays are examples with a leading batch dimension.

    batch_sizes: those that batches are preferred to have. parameters: text for whoever reads the configuration.
    warm_up: every batch size runs once before the model counts as ready; see `warm_up_files`.
    """
    options = options or TritonOptions()
    lines = [f'name: "{name}"', f'backend: "{options.backend}"', f"max_batch_size: {max_batch}"]
    lines += tensor_lines(inputs, outputs)
    lines += [f"version_policy {{ latest {{ num_versions: {_KEPT_VERSIONS} }} }}", *_instances(name, options)]
    lines += _batching([size for size in batch_sizes if size > 1])
    if options.allows("model_metrics"):
        lines += _metrics()
    if warm_up:
        lines += [line for size in batch_sizes or (1,) for line in _warm_up(size, inputs)]
    text = {_threads_key(options.backend): str(options.threads)} if options.backend != "tensorrt" else {}
    text |= {"batch_sizes": ",".join(map(str, batch_sizes))} if batch_sizes else {}
    lines += [
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in (text | dict(parameters or {})).items()
    ]
    return "\n".join(lines) + "\n"


def tensor_lines(inputs: Arrays, outputs: Arrays) -> list[str]:
    """The inputs and outputs of a configuration."""
    kinds = (("input", inputs), ("output", outputs))
    return [_tensor(kind, tensor, example) for kind, arrays in kinds for tensor, example in arrays.items()]


def warm_up_files(inputs: Arrays) -> dict[str, bytes]:
    """Contents of the files in `WARM_UP_FOLDER`, by name: one sample of each input that zeros are no value for, as
    token ids and masks are none."""
    return {tensor: example[:1].tobytes() for tensor, example in inputs.items() if _needs_data(example)}


def _tensor(kind: str, name: str, example: NDArray[Any]) -> str:
    # Triton has no tensor without dimensions beside the batch: one number a sample travels as [batch, 1]
    reshape = "" if example.ndim > 1 else " reshape { shape: [ ] }"
    return f'{kind} {{ name: "{name}" data_type: {_type(example)} dims: [ {_dims(example)} ]{reshape} }}'


def _instances(name: str, options: TritonOptions) -> list[str]:
    """One device for all: under `--rate-limit=execution_count` one model runs at a time, and a critic gets a tenth of
    the turns of a policy. Without that flag Triton ignores this."""
    kind = "KIND_GPU" if options.backend == "tensorrt" else "KIND_AUTO"
    turn = 10 if name == "critic" else 1
    return [
        f"instance_group {{ count: {options.instances} kind: {kind} rate_limiter {{ "
        f'resources {{ name: "device" global: true count: 1 }} priority: {turn} }} }}'
    ]


def _batching(preferred: Sequence[int]) -> list[str]:
    """Whatever waits when an instance is free, at once: no request is delayed to wait for company."""
    sizes = f" preferred_batch_size: [ {', '.join(map(str, preferred))} ]" if preferred else ""
    return [
        f"dynamic_batching {{{sizes} max_queue_delay_microseconds: 0 priority_levels: 2 default_priority_level: 2",
        f"  default_queue_policy {{ timeout_action: REJECT default_timeout_microseconds: {_PATIENCE_US}",
        f"    allow_timeout_override: true max_queue_size: {_QUEUE} }} }}",
    ]


def _metrics() -> list[str]:
    return [
        'model_metrics { metric_control { metric_identifier { family: "nv_inference_first_response_histogram_ms" }',
        f"  histogram_options {{ buckets: [ {', '.join(map(str, _BUCKETS_MS))} ] }} }} }}",
    ]


def _warm_up(size: int, inputs: Arrays) -> list[str]:
    lines = [f'model_warmup {{ name: "batch {size}" batch_size: {size}']
    for tensor, example in inputs.items():
        data = f'input_data_file: "{tensor}"' if _needs_data(example) else "zero_data: true"
        value = f"data_type: {_type(example)} dims: [ {_dims(example)} ] {data}"
        lines.append(f'  inputs {{ key: "{tensor}" value {{ {value} }} }}')
    return [*lines, "}"]


def _threads_key(backend: Backend) -> str:
    return "threads" if backend == "python" else "intra_op_thread_count"


def _needs_data(example: NDArray[Any]) -> bool:
    return np.dtype(example.dtype).name in ("int32", "bool")


def _dims(example: NDArray[Any]) -> str:
    return ", ".join(str(n) for n in example.shape[1:]) or "1"


def _type(example: NDArray[Any]) -> str:
    name = np.dtype(example.dtype).name
    if name not in _TYPES:
        raise ValueError(f"tensor type: expected one of {sorted(_TYPES)}, got {name}")
    return _TYPES[name]
