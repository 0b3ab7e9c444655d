"""The embedded engine: onnxruntime inside the service process, on the CPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from recap_model.spec import Spec
from recap_model.tokenizer import TextTokenizer
from services.common.engine import Arrays, EngineError
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


@dataclass(frozen=True)
class _Input:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # of one sample


class OnnxRuntimeEngine:
    """One session per batch size: with every shape fixed, onnxruntime folds shape arithmetic away and plans its memory
    once. One thread per session: a robot's control loop shares these cores, and small graphs gain nothing from more."""

    def __init__(self, model: ModelFolder, batch_sizes: tuple[int, ...] = BATCH_SIZES) -> None:
        self._model = model
        self._sessions = {size: _session(model, size) for size in sorted(batch_sizes)}
        first = self._sessions[min(self._sessions)]
        self._inputs = {item.name: _describe(item, model) for item in first.get_inputs()}
        self._outputs = [item.name for item in first.get_outputs()]

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

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Engine.run`."""
        count = self._check(inputs)
        size = next((size for size in self._sessions if size >= count), None)
        if size is None:
            raise EngineError(f"{self.name}: batch: expected at most {max(self._sessions)} samples, got {count}")
        feed = {name: _pad(inputs[name], size) for name in self._inputs}
        outputs = self._sessions[size].run(self._outputs, feed)
        return {name: array[:count] for name, array in zip(self._outputs, outputs, strict=True)}

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""
        for size in self._sessions:
            # Ones, not zeros: an all-false token mask is no input that a model has to answer.
            self.run({name: np.ones((size, *item.shape), item.dtype) for name, item in self._inputs.items()})

    def close(self) -> None:
        self._sessions.clear()

    def _check(self, inputs: Arrays) -> int:
        missing = [name for name in self._inputs if name not in inputs]
        if missing:
            raise EngineError(f"{self.name}: inputs: expected {sorted(self._inputs)}, got {sorted(inputs)}")
        counts = set()
        for name, want in self._inputs.items():
            array = inputs[name]
            if array.dtype != want.dtype or array.shape[1:] != want.shape or array.ndim == 0:
                raise EngineError(
                    f"{self.name}: input {name}: expected {want.dtype} [batch, "
                    f"{', '.join(map(str, want.shape))}], got {array.dtype} {list(array.shape)}"
                )
            counts.add(len(array))
        if len(counts) != 1 or 0 in counts:
            raise EngineError(
                f"{self.name}: batch: expected the same number (at least 1) for all inputs, got {sorted(counts)}"
            )
        return counts.pop()


def _session(model: ModelFolder, size: int) -> onnxruntime.InferenceSession:
    path = model.path / "model.onnx"
    if not path.is_file():
        raise EngineError(
            f"{model.path}: expected a file model.onnx, got none; export with `recap export CHECKPOINT --target onnx`"
        )
    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name(BATCH_DIMENSION, size)
    options.intra_op_num_threads = 1
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


def _describe(item: Any, model: ModelFolder) -> _Input:
    shape = tuple(item.shape[1:])
    if item.type not in _DTYPES or not all(isinstance(extent, int) for extent in shape):
        raise EngineError(
            f"{model.path}: input {item.name}: expected a known dtype and fixed extents, got {item.type} {item.shape}"
        )
    return _Input(np.dtype(_DTYPES[item.type]), shape)


def _pad(array: NDArray[Any], size: int) -> NDArray[Any]:
    """Fill up to `size` samples with copies of the last one; no copy when it fits."""
    lack = size - len(array)
    return array if lack == 0 else np.concatenate([array, np.repeat(array[-1:], lack, axis=0)])
