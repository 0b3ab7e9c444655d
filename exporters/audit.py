"""Operator audit: what TensorRT or onnxruntime are known to reject is found before they do."""

from collections.abc import Callable
from typing import Literal

from onnx import ModelProto, NodeProto, TensorProto

Runtime = Literal["onnxruntime", "tensorrt"]

# operator -> why it must not be there, for every runtime
_CONTROL = "control flow: breaks graph capture, and TensorRT unrolls or rejects it"
_DATA = "its output shape depends on data"
_FORBIDDEN: dict[str, str] = {
    **dict.fromkeys(("Loop", "If", "Scan"), _CONTROL),
    **dict.fromkeys(("NonZero", "Unique", "NonMaxSuppression", "Compress"), _DATA),
    "ScatterND": "an indexed assignment: write it as slices and a concatenation",
    "ScatterElements": "an indexed assignment: write it as slices and a concatenation",
    "Resize": "runtimes disagree about its coordinates: resize by matrix products",
    "Multinomial": "randomness belongs outside the graph: noise is an input",
    "RandomNormal": "randomness belongs outside the graph: noise is an input",
    "RandomNormalLike": "randomness belongs outside the graph: noise is an input",
    "ComplexAbs": "complex numbers",
}
_DOMAINS: dict[str, set[str]] = {"onnxruntime": {"", "com.microsoft"}, "tensorrt": {""}}


class AuditError(ValueError):
    """A graph holds operators or types that a runtime is known to reject."""


def audit(model: ModelProto, runtime: Runtime) -> dict[str, int]:
    """Refuse a graph that `runtime` would reject. Returns how many nodes of each operator it has."""
    problems = [problem for check in _CHECKS for problem in check(model, runtime)]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise AuditError(f"graph for {runtime}: {'; '.join(problems[:8])}{more}")
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def _operators(model: ModelProto, runtime: Runtime) -> list[str]:
    found = []
    for node in model.graph.node:
        if node.op_type in _FORBIDDEN:
            found.append(f"{_where(node)}: {_FORBIDDEN[node.op_type]}")
        elif "Sequence" in node.op_type:
            found.append(f"{_where(node)}: sequences stop graph capture and run on the CPU")
        elif node.domain not in _DOMAINS[runtime]:
            found.append(f"{_where(node)}: operator of {node.domain!r}, which {runtime} does not have")
    return found


def _functions(model: ModelProto, _: Runtime) -> list[str]:
    return [f"function {f.name}: not inlined" for f in model.functions]


def _types(model: ModelProto, runtime: Runtime) -> list[str]:
    bad = {TensorProto.DOUBLE: "fp64 has no kernels for cosine and others", TensorProto.COMPLEX64: "complex numbers"}
    if runtime == "onnxruntime":
        bad[TensorProto.BFLOAT16] = "onnxruntime has no bf16 arithmetic on the CPU; use fp16 or fp32"
    found = [f"weight {w.name}: {bad[w.data_type]}" for w in model.graph.initializer if w.data_type in bad]
    casts = [n for n in model.graph.node if n.op_type == "Cast" and n.attribute[0].i in bad]
    return found + [f"{_where(n)}: {bad[n.attribute[0].i]}" for n in casts]


def _norms(model: ModelProto, runtime: Runtime) -> list[str]:
    """TensorRT takes a LayerNormalization with one output; torch's exporter declares three."""
    if runtime != "tensorrt":
        return []
    nodes = [n for n in model.graph.node if n.op_type == "LayerNormalization" and len([o for o in n.output if o]) > 1]
    return [f"{_where(n)}: expected one output, got {len(n.output)}" for n in nodes]


def _bool_sums(model: ModelProto, _: Runtime) -> list[str]:
    """CumSum of a bool is rejected everywhere; a comparison or a mask must be cast first."""
    logic = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not"}
    made_by = {o: n for n in model.graph.node for o in n.output}
    sums = [n for n in model.graph.node if n.op_type == "CumSum"]
    return [f"{_where(n)}: of a bool" for n in sums if n.input[0] in made_by and made_by[n.input[0]].op_type in logic]


_CHECKS: tuple[Callable[[ModelProto, Runtime], list[str]], ...] = (_operators, _functions, _types, _norms, _bool_sums)


def _where(node: NodeProto) -> str:
    return f"{node.op_type} ({node.name or 'unnamed'})"


def drop_unused_outputs(model: ModelProto) -> ModelProto:
    """Remove the mean and deviation outputs of LayerNormalization that nothing reads."""
    read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            while len(node.output) > 1 and node.output[-1] not in read:
                del node.output[-1]
    return model
