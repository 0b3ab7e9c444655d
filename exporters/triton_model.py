"""`model.py` of the python backend: onnxruntime inside Triton. The exporter copies this file into version folders.

It stands alone, since Triton's stub knows neither PYTHONPATH nor our packages: numpy, onnxruntime, and the module that
the stub brings itself. `model.onnx` lies beside it. One session per batch size, as in the embedded engine.

Tensors go in and out by DLPack. The stub of Triton 2.51 was built for numpy 1: on numpy 2 its `as_numpy` repeats the
first element all over the array, and `Tensor(name, array)` sends no bytes at all; neither says a word.
"""

import ctypes
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

BATCH_DIMENSION = "batch"

_CONSUMED = b"used_dltensor"  # kept: a capsule points to its name


class TritonPythonModel:
    """The names and calls are Triton's."""

    def initialize(self, args: dict[str, str]) -> None:
        """args: strings that Triton passes; `model_config` is the configuration as JSON."""
        # the bytecode that Python has just put beside this file is no part of the model: services hash the folder
        shutil.rmtree(Path(__file__).resolve().parent / "__pycache__", ignore_errors=True)
        self._triton: Any = importlib.import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        texts = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        largest = max(int(config["max_batch_size"]), 1)
        sizes = sorted({int(size) for size in texts.get("batch_sizes", "").split(",") if size} | {largest})
        providers = _providers(args.get("model_instance_kind", ""), args.get("model_instance_device_id", "0"))
        path = Path(__file__).resolve().parent / "model.onnx"
        self._sessions = {size: _session(path, size, int(texts.get("threads", "1")), providers) for size in sizes}
        first = self._sessions[sizes[0]]
        self._inputs = {item.name: item.type for item in first.get_inputs()}
        self._outputs = [item.name for item in first.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in order. Requests that arrived together run as one batch; when that fails,
        each runs alone, so that a bad one fails without the others."""
        samples: list[Any] = []
        for request in requests:
            try:
                samples.append(self._arrays(request))
            except Exception as error:
                samples.append(error)
        good = [sample for sample in samples if not isinstance(sample, Exception)]
        try:
            answers: list[Any] = self._together(good)
        except Exception as error:
            answers = [error] if len(good) == 1 else [self._alone(sample) for sample in good]
        ordered = iter(answers)
        return [self._response(s if isinstance(s, Exception) else next(ordered)) for s in samples]

    def finalize(self) -> None:
        """The model is unloaded."""
        self._sessions.clear()

    def _arrays(self, request: Any) -> dict[str, Any]:
        tensors = {name: self._triton.get_input_tensor_by_name(request, name) for name in self._inputs}
        missing = [name for name, tensor in tensors.items() if tensor is None]
        if missing:
            raise ValueError(f"inputs: expected {list(self._inputs)}, got none named {', '.join(missing)}")
        arrays = {name: np.from_dlpack(tensor) for name, tensor in tensors.items()}
        truths = [name for name, kind in self._inputs.items() if kind == "tensor(bool)"]
        return arrays | {name: arrays[name].view(np.bool_) for name in truths}  # DLPack may call them bytes

    def _alone(self, sample: dict[str, Any]) -> Any:
        try:
            return self._together([sample])[0]
        except Exception as error:
            return error

    def _together(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Outputs of each of `samples`, arrays of [B_i, ...], run as one batch padded to a size that there is."""
        if not samples:
            return []
        counts = [len(next(iter(sample.values()))) for sample in samples]
        size = next(size for size in self._sessions if size >= sum(counts))
        feed = {name: _batch([sample[name] for sample in samples], size) for name in self._inputs}
        outputs = self._sessions[size].run(self._outputs, feed)
        ends = np.cumsum(counts)
        return [
            {name: array[end - count : end] for name, array in zip(self._outputs, outputs, strict=True)}
            for end, count in zip(ends, counts, strict=True)
        ]

    def _response(self, answer: Any) -> Any:
        if isinstance(answer, Exception):
            error = self._triton.TritonError(f"{type(answer).__name__}: {answer}")
            return self._triton.InferenceResponse(output_tensors=[], error=error)
        tensors = [self._tensor(name, array) for name, array in answer.items()]
        return self._triton.InferenceResponse(output_tensors=tensors)

    def _tensor(self, name: str, array: Any) -> Any:
        capsule = np.ascontiguousarray(array).__dlpack__()
        tensor = self._triton.Tensor.from_dlpack(name, capsule)
        # the stub renames what it took over to "used_dlpack"; numpy knows the standard's name alone, and would write a
        # traceback into the log for every output
        ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), _CONSUMED)
        return tensor


def _batch(arrays: list[Any], size: int) -> Any:
    """[size, ...], filled up with copies of the last sample."""
    lack = size - sum(len(array) for array in arrays)
    parts = [*arrays, np.repeat(arrays[-1][-1:], lack, axis=0)] if lack else arrays
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _providers(kind: str, device: str) -> list[Any]:
    if "GPU" in kind and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return [("CUDAExecutionProvider", {"device_id": device}), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


def _session(path: Path, size: int, threads: int, providers: list[Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name(BATCH_DIMENSION, size)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=providers)
