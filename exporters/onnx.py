"""Torch graph -> ONNX with one symbolic dimension, `batch`; engines fix it to the batch sizes they serve."""

import logging
import warnings
from pathlib import Path

import onnx
import torch

from exporters.wrap import Graph

OPSET = 18
BATCH_SIZES = (1, 2, 4, 8)


def export_onnx(graph: Graph, path: Path) -> None:
    """Write `graph` as a self-contained ONNX file."""
    example = graph.example(3, 0)  # not 1 or 2: torch.export would take those sizes for constants
    args = tuple(torch.from_numpy(example[name]) for name in graph.inputs)
    batch = torch.export.Dim("batch", min=1, max=max(BATCH_SIZES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            graph.module,
            args,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=({0: batch},) * len(args) if graph.name == "critic" else (({0: batch},) * len(args),),
            verbose=False,
        )
    if program is None:
        raise RuntimeError(f"{graph.name}: torch.onnx.export returned nothing")
    program.save(str(path))
    _forget_sources(path)


def _forget_sources(path: Path) -> None:
    """Remove what torch notes beside every node: source lines, with the paths of the machine that exported."""
    model = onnx.load(path)
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            del node.metadata_props[:]
            node.doc_string = ""
    onnx.save(model, path)
