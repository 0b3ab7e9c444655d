"""Torch graph -> ONNX with one symbolic dimension, `batch`; engines fix it to the batch sizes they serve."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from exporters.stitch import unroll
from exporters.wrap import Graph
from recap_model.policy import flow
from recap_model.policy.static import CHUNKING, StaticPolicy, StaticPrefix

OPSET = 18
BATCH_SIZES = (1, 2, 4, 8)
EXTERNAL_ABOVE = 1 << 30  # protobuf ends at 2 GiB; weights go beside the graph well before
_EXAMPLE_BATCH = 3  # not 1 or 2: torch.export would take those sizes for constants


def export_onnx(graph: Graph, path: Path) -> onnx.ModelProto:
    """Write `graph` as ONNX (weights beside it as `<name>.data` when they are large) and return the model."""
    module = graph.module
    if isinstance(module, StaticPolicy):
        model = _policy(module, graph)
    else:
        example = graph.example(_EXAMPLE_BATCH, 0)
        args = tuple(torch.from_numpy(example[name]) for name in graph.inputs)
        model = _export(module, args, graph.inputs, graph.outputs, [1] * len(args))
    save_onnx(model, path)
    return model


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a model; large weights go into `<name>.data` beside it."""
    size = sum(len(item.raw_data) for item in model.graph.initializer)
    if size > EXTERNAL_ABOVE:
        beside = onnx.ModelProto()
        beside.CopyFrom(model)  # saving with external data empties the tensors
        location = path.name + ".data"
        onnx.save(beside, path, save_as_external_data=True, location=location, size_threshold=1024)
    else:
        onnx.save(model, path)


class _Before(nn.Module):
    def __init__(self, module: StaticPolicy, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        previous = (self.module.scaling.actions(given["previous"]),) if self.module.options.rtc else ()
        return (*self.module.prepare(given).flat(), *previous)


class _Step(nn.Module):
    def __init__(self, module: StaticPolicy, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        extra = {k: given[k] for k in ("beta", "previous", "weights", "guidance", "time") if k in given}
        flat = tuple(value for name, value in given.items() if name.startswith("prefix_") and name[7:].isdigit())
        return self.module.step(given["x"], given["time_bias"], StaticPrefix.of(flat), **extra)


class _After(nn.Module):
    def __init__(self, module: StaticPolicy) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.scaling.physical(x)


def _policy(module: StaticPolicy, graph: Graph) -> onnx.ModelProto:
    """Export before, step and after, and unroll the step."""
    options, config = module.options, module.config
    example = {name: torch.from_numpy(value) for name, value in graph.example(_EXAMPLE_BATCH, 0).items()}
    early = [name for name in options.inputs if name not in ("noise", "beta", *CHUNKING[1:])]
    before = _Before(module, early)
    with torch.no_grad():
        outputs = before(*(example[name] for name in early))
    flat = outputs[:-1] if options.rtc else outputs
    names = [f"prefix_{i}" for i in range(len(flat))] + (["previous_normalised"] if options.rtc else [])
    first = _export(before, tuple(example[n] for n in early), early, names, [1] * len(early))

    times = flow.times(config.denoise_steps)
    wide = 2 if options.guided else 1
    arguments: dict[str, tuple[Tensor, int]] = {"x": (example["noise"], 1), "time_bias": (module.time_bias[0], 0)}
    if options.guided:
        arguments["beta"] = (example["beta"], 1)
    if options.rtc:
        arguments |= {"previous": (outputs[-1], 1), "weights": (example["prefix_weights"], 1)}
        arguments |= {"guidance": (example["guidance_weights"][:, 0], 1), "time": (torch.tensor(times[0]), 0)}
    arguments |= {name: (value, wide) for name, value in zip(names, flat, strict=False)}
    tensors = tuple(value.contiguous() for value, _ in arguments.values())
    step = _export(
        _Step(module, tuple(arguments)), tensors, tuple(arguments), ("x_next",), [d for _, d in arguments.values()]
    )
    after = _export(_After(module), (example["noise"],), ("x",), ("actions",), [1])
    _rename(step, {"previous": "previous_normalised", "weights": "prefix_weights"})
    bias = module.time_bias.detach().float().numpy()
    constants: dict[str, Sequence[Any]] = {"time_bias": list(bias)}
    if options.rtc:
        constants["time"] = [torch.tensor(time).numpy() for time in times]
    noise = onnx.helper.make_tensor_value_info("noise", onnx.TensorProto.FLOAT, ["batch", *example["noise"].shape[1:]])
    before_inputs = {item.name for item in first.graph.input}
    for name in options.inputs:
        if name not in before_inputs:
            value = example[name]
            info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *value.shape[1:]])
            first.graph.input.append(noise if name == "noise" else info)
    return unroll(
        first,
        step,
        after,
        state="noise",
        result="actions",
        constants=constants,
        columns={"guidance": "guidance_weights"} if options.rtc else {},
        inputs=options.inputs,
    )


def _rename(model: onnx.ModelProto, names: dict[str, str]) -> None:
    """Give graph inputs other names."""
    for item in model.graph.input:
        item.name = names.get(item.name, item.name)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)


def _export(
    module: nn.Module, args: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str], batches: Sequence[int]
) -> onnx.ModelProto:
    """batches: for each argument, how many batches its first dimension holds; 0 = it has none."""
    batch = torch.export.Dim("batch", min=1, max=max(BATCH_SIZES))
    shapes: list[Any] = [{0: batch * n if n > 1 else batch} if n else None for n in batches]
    # a module with *args takes its shapes as one tuple
    variadic = isinstance(module, (_Before, _Step))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module.eval(),
            args,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(tuple(shapes),) if variadic else tuple(shapes),
            verbose=False,
        )
    if program is None:
        raise RuntimeError(f"{type(module).__name__}: torch.onnx.export returned nothing")
    return _forget_sources(program.model_proto)


def _forget_sources(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what torch notes beside every node: source lines, with the paths of the machine that exported."""
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            del node.metadata_props[:]
            node.doc_string = ""
    del model.graph.metadata_props[:]
    return model
