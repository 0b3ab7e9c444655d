"""`config.pbtxt` for a graph: generated text, parsed back in a test."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "int32": "TYPE_INT32", "bool": "TYPE_BOOL"}


def config_pbtxt(name: str, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]], max_batch: int) -> str:
    """Triton model configuration; arrays are examples with a leading batch dimension."""
    lines = [f'name: "{name}"', 'platform: "onnxruntime_onnx"', f"max_batch_size: {max_batch}"]
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for tensor, example in tensors.items():
            dims = ", ".join(str(n) for n in example.shape[1:]) or "1"
            reshape = "" if example.ndim > 1 else " reshape: { shape: [ ] }"
            lines.append(f'{kind} {{ name: "{tensor}" data_type: {_type(example)} dims: [ {dims} ]{reshape} }}')
    lines.append("dynamic_batching { max_queue_delay_microseconds: 0 }")
    return "\n".join(lines) + "\n"


def _type(example: NDArray[Any]) -> str:
    name = np.dtype(example.dtype).name
    if name not in _TYPES:
        raise ValueError(f"tensor type: expected one of {sorted(_TYPES)}, got {name}")
    return _TYPES[name]
