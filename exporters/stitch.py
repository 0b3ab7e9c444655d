"""Three small ONNX graphs -> one: what comes before the denoising loop, one step, what comes after, with the step
repeated in place.

Exporting the unrolled loop through torch takes a quarter of an hour for the full model, one step takes half a minute;
and the copies made here share their weights by name. No Loop operator: engines fuse straight code better, and some
reject loops. Identical nodes of different steps (a transposed key, say) are merged by every engine's optimiser.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

Array = NDArray[Any]


def unroll(
    before: ModelProto,
    step: ModelProto,
    after: ModelProto,
    *,
    state: str,
    result: str,
    constants: Mapping[str, Sequence[Array]],
    columns: Mapping[str, str],
    inputs: Sequence[str],
) -> ModelProto:
    """state: graph input that the first step starts from; the step's first input and only output carry it on.

    constants: step input -> its value at each step. columns: step input -> graph input [B, steps] whose column it is.
    result: name of the graph's only output, that of `after`. inputs: order of the graph's inputs.
    """
    steps = len(next(iter(constants.values())))
    nodes = list(before.graph.node)
    weights: dict[str, onnx.TensorProto] = {}
    shared: dict[str, dict[str, str]] = {}  # part -> its weights' names: one copy for all steps
    for part, prefix in ((before, ""), (step, "step."), (after, "after.")):
        _require_flat(part)
        shared[prefix] = {item.name: prefix + item.name for item in part.graph.initializer}
        for item in part.graph.initializer:
            item.name = prefix + item.name
            weights[item.name] = item
    carried = state
    for i in range(steps):
        names = dict(shared["step."])
        names[step.graph.input[0].name] = carried
        for name, values in constants.items():
            names[name] = f"{name}.{i}"
            weights[names[name]] = numpy_helper.from_array(np.asarray(values[i]), names[name])
        for name, source in columns.items():
            names[name] = f"{name}.{i}"
            index = f"column.{i}"
            weights[index] = numpy_helper.from_array(np.asarray(i, np.int64), index)
            nodes.append(helper.make_node("Gather", [source, index], [names[name]], name=f"pick {names[name]}", axis=1))
        nodes += _copies(step.graph.node, names, f"step{i}.")
        carried = names.get(step.graph.output[0].name, f"step{i}." + step.graph.output[0].name)
    names = shared["after."] | {after.graph.input[0].name: carried, after.graph.output[0].name: result}
    nodes += _copies(after.graph.node, names, "after.")
    known = {item.name: item for part in (before, step) for item in part.graph.input}
    graph = helper.make_graph(
        nodes,
        before.graph.name,
        [_value(known, name) for name in inputs],
        [after.graph.output[0]],
        list(weights.values()),
    )
    model = helper.make_model(graph, opset_imports=before.opset_import, ir_version=before.ir_version)
    model.producer_name = "recap"
    return model


def _value(values: Mapping[str, onnx.ValueInfoProto], name: str) -> onnx.ValueInfoProto:
    if name not in values:
        raise ValueError(f"stitch: expected a graph input {name!r}, got {sorted(values)}")
    return values[name]


def _copies(nodes: Iterable[NodeProto], names: dict[str, str], prefix: str) -> list[NodeProto]:
    """Copies of nodes whose own values get `prefix`; `names` maps what comes from outside (and grows)."""
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = prefix + node.name
        for i, name in enumerate(node.input):
            copy.input[i] = names.get(name, name)
        for i, name in enumerate(node.output):
            copy.output[i] = names.setdefault(name, prefix + name) if name else name
        copies.append(copy)
    return copies


def _require_flat(model: ModelProto) -> None:
    nested = sorted({n.op_type for n in model.graph.node for a in n.attribute if a.HasField("g")})
    if model.functions or nested:
        raise ValueError(f"stitch: expected a flat graph, got functions {[f.name for f in model.functions]}, {nested}")
