"""Number formats of an exported graph: int8 by dynamic quantisation, and what a file really holds.

Others have published "fp16" and "int8" files that were fp32 to the last byte, so the claim is read back from the graph.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import onnx
from onnx import ModelProto, TensorProto

Precision = Literal["fp32", "fp16", "int8"]

_FORMATS = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
_FORMATS |= {TensorProto.INT8: "int8", TensorProto.UINT8: "int8", TensorProto.DOUBLE: "fp64"}
_PRODUCTS = ("MatMul", "Gemm", "MatMulInteger")
_SHARE = 0.9


class PrecisionError(ValueError):
    """A graph does not hold the weights that its name says."""


def quantize_int8(source: Path, target: Path) -> ModelProto:
    """Weights of matrix products to int8 per channel, activations at run time: for CPUs with integer dot products.

    The state, the action projections and the head stay in fp32 (`Dense` keeps them apart by name: `*_in`, `*_out`).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source, load_external_data=False)
    weights = {item.name for item in model.graph.initializer}
    keep = [n.name for n in model.graph.node if n.op_type == "MatMul" and _is_end(n, weights)]
    large = (source.parent / (source.name + ".data")).exists()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".int8.") as scratch, _quiet():
        out = Path(scratch) / "model.onnx"
        quantize_dynamic(
            source,
            out,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=keep,
            use_external_data_format=large,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT},
        )
        return onnx.load(out)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the quantiser's advice, given on the root logger, to run another tool first."""
    root, before = logging.getLogger(), logging.getLogger().level
    root.setLevel(max(before, logging.ERROR))
    try:
        yield
    finally:
        root.setLevel(before)


def _is_end(node: onnx.NodeProto, weights: set[str]) -> bool:
    names = [name for name in node.input if name in weights]
    return any(part in name for name in names for part in ("action_in", "action_out", "state_in"))


def weight_formats(model: ModelProto) -> dict[str, float]:
    """Share of the matrix products' constant numbers held in each format, e.g. {"int8": 0.98, "fp32": 0.02}."""
    weights = {item.name: item for item in model.graph.initializer}
    count: Counter[str] = Counter()
    seen: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in _PRODUCTS:
            continue
        for name in node.input:
            item = weights.get(name)
            if item is None or name in seen or len(item.dims) < 2:
                continue
            seen.add(name)
            size = 1
            for extent in item.dims:
                size *= extent
            count[_FORMATS.get(item.data_type, TensorProto.DataType.Name(item.data_type).lower())] += size
    total = sum(count.values())
    return {name: amount / total for name, amount in count.most_common()} if total else {}


def require_precision(model: ModelProto, precision: Precision) -> dict[str, float]:
    """Refuse a graph of which less than 90 % of the weights are in `precision`; returns the shares."""
    shares = weight_formats(model)
    if shares.get(precision, 0.0) < _SHARE:
        got = ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) or "no weights at all"
        raise PrecisionError(f"graph: expected at least {_SHARE:.0%} of the weights in {precision}, got {got}")
    return shares
