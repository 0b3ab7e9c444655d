"""The embedded engine: onnxruntime inside the service process, on the CPU."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from recap_model.spec import Spec
from recap_model.tokenizer import TextTokenizer
from services.common.engine import Arrays, EngineError
from services.common.engine_inputs import Input, check_inputs, fitting_size, ones, pad, timed_runs
from services.common.repository import ModelFolder

BATCH_SIZES = (1, 2, 4, 8)
BATCH_DIMENSION = "batch"

_DTYPES = {
    "tensor(uint8)": np.uint8,
    "tensor(float)": np.float32,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


class OnnxRuntimeEngine:
    """One session per batch size: with every shape fixed, onnxruntime folds shape arithmetic away and plans its memory
    once. One thread per session by default: a robot's control loop shares these cores, and small graphs gain nothing
    from more. batch_sizes: None = those that the model was exported for."""

    def __init__(self, model: ModelFolder, batch_sizes: tuple[int, ...] | None = None, threads: int = 1) -> None:
        self._model = model
        sizes = batch_sizes or model.manifest.parameters.get("batch_sizes") or BATCH_SIZES
        self._sessions = {size: _session(model, size, threads) for size in sorted(sizes)}
        first = self._sessions[min(self._sessions)]
        self._inputs = {item.name: _describe(item, model) for item in first.get_inputs()}
        self._outputs = [item.name for item in first.get_outputs()]
        self._run_times: dict[int, float] = {}

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def version(self) -> str:
        return self._model.version

    @property
    def hash(self) -> str:
        return self._model.hash

    @property
    def spec(self) -> Spec:
        return self._model.spec

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._model.tokenizer

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return tuple(self._sessions)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self._inputs)

    @property
    def input_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: item.shape for name, item in self._inputs.items()}

    @property
    def run_times(self) -> Mapping[int, float]:
        return self._run_times

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Engine.run`."""
        count = check_inputs(self.name, self._inputs, inputs)
        size = fitting_size(self.name, self._sessions, count)
        feed = {name: pad(inputs[name], size) for name in self._inputs}
        outputs = self._sessions[size].run(self._outputs, feed)
        return {name: array[:count] for name, array in zip(self._outputs, outputs, strict=True)}

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""
        self._run_times = timed_runs(self._sessions, lambda size: self.run(ones(self._inputs, size)))

    def close(self) -> None:
        self._sessions.clear()


def _session(model: ModelFolder, size: int, threads: int) -> onnxruntime.InferenceSession:
    path = model.path / "model.onnx"
    if not path.is_file():
        raise EngineError(
            f"{model.path}: expected a file model.onnx, got none; export with `recap export CHECKPOINT --target onnx`"
        )
    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name(BATCH_DIMENSION, size)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.enable_mem_pattern = True
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise EngineError(f"{path}: onnxruntime {onnxruntime.__version__} cannot load it: {error}") from error
    got = session.get_inputs()[0].shape[0]
    if got != size:
        raise EngineError(f"{path}: expected a first dimension named {BATCH_DIMENSION!r} in every input, got {got!r}")
    return session


def _describe(item: Any, model: ModelFolder) -> Input:
    shape = tuple(item.shape[1:])
    if item.type not in _DTYPES or not all(isinstance(extent, int) for extent in shape):
        raise EngineError(
            f"{model.path}: input {item.name}: expected a known dtype and fixed extents, got {item.type} {item.shape}"
        )
    return Input(np.dtype(_DTYPES[item.type]), shape)
