"""What every in-process engine does with its inputs: describe them, check a batch, pad it to a size that is served,
warm up with them."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.engine import Arrays, EngineError


@dataclass(frozen=True)
class Input:
    """dtype and shape of one sample, without the batch dimension."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def check_inputs(model: str, wanted: Mapping[str, Input], inputs: Arrays) -> int:
    """Samples in `inputs` (every array [B, ...]). Raises EngineError that names `model` and the input at fault."""
    missing = [name for name in wanted if name not in inputs]
    if missing:
        raise EngineError(f"{model}: inputs: expected {sorted(wanted)}, got {sorted(inputs)}")
    counts = set()
    for name, want in wanted.items():
        array = inputs[name]
        if array.dtype != want.dtype or array.shape[1:] != want.shape or array.ndim == 0:
            raise EngineError(
                f"{model}: input {name}: expected {want.dtype} [batch, "
                f"{', '.join(map(str, want.shape))}], got {array.dtype} {list(array.shape)}"
            )
        counts.add(len(array))
    if len(counts) != 1 or 0 in counts:
        raise EngineError(f"{model}: batch: expected the same number (at least 1) for all inputs, got {sorted(counts)}")
    return counts.pop()


def fitting_size(model: str, sizes: Iterable[int], count: int) -> int:
    """The smallest of the ascending `sizes` that holds `count` samples. Raises EngineError when none does."""
    sizes = tuple(sizes)
    size = next((size for size in sizes if size >= count), None)
    if size is None:
        raise EngineError(f"{model}: batch: expected at most {max(sizes)} samples, got {count}")
    return size


def pad(array: NDArray[Any], size: int) -> NDArray[Any]:
    """Fill up to `size` samples with copies of the last one; no copy when it fits."""
    lack = size - len(array)
    return array if lack == 0 else np.concatenate([array, np.repeat(array[-1:], lack, axis=0)])


def ones(wanted: Mapping[str, Input], size: int) -> dict[str, NDArray[Any]]:
    """Inputs to warm up with: ones, not zeros, for an all-false token mask is no input that a model has to answer."""
    return {name: np.ones((size, *item.shape), item.dtype) for name, item in wanted.items()}


def timed_runs(sizes: Iterable[int], run: Callable[[int], object]) -> dict[int, float]:
    """Run every size twice, for the first run does what no later one has to; seconds of the second."""
    seconds = {}
    for size in sizes:
        run(size)
        began = time.perf_counter()
        run(size)
        seconds[size] = time.perf_counter() - began
    return seconds
