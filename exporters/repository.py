"""Checkpoints -> model repository: `<name>/config.pbtxt` and `<name>/<version>/`, published whole or not at all."""

import json
import shutil
from pathlib import Path

from exporters.onnx import BATCH_SIZES, export_onnx
from exporters.parity import Tolerance, onnx_parity
from exporters.triton_config import config_pbtxt
from exporters.wrap import Graph, load_graphs
from recap_model.manifest import Manifest, publish, write_manifest
from recap_model.spec import write_spec

VERSION = "1"


def export_checkpoint(checkpoint: Path, out: Path, *, guided: bool, tolerance: Tolerance) -> list[Manifest]:
    """Export every graph of `checkpoint` into the repository `out`; the other models in it stay."""
    graphs = load_graphs(checkpoint, guided=guided)
    if any(graph.name == "policy" for graph in graphs):
        # never beside a policy of another checkpoint: `recap serve --beta` would take it for this one's
        shutil.rmtree(out / "policy_guided", ignore_errors=True)
    return [_publish(graph, out, tolerance) for graph in graphs]


def _publish(graph: Graph, out: Path, tolerance: Tolerance) -> Manifest:
    with publish(out / graph.name) as folder:
        version = folder / VERSION
        version.mkdir()
        export_onnx(graph, version / "model.onnx")
        receipt = onnx_parity(graph, version / "model.onnx", BATCH_SIZES, tolerance)
        (version / "parity.json").write_text(json.dumps(receipt, indent=1) + "\n")
        write_spec(graph.files.spec, version / "spec.json")
        graph.files.tokenizer.save(version / "tokenizer.json")
        inputs = graph.example(1, 0)
        pbtxt = config_pbtxt(graph.name, inputs, graph.run(inputs), max(BATCH_SIZES))
        (folder / "config.pbtxt").write_text(pbtxt)
        source = graph.files.manifest
        return write_manifest(
            version,
            "model",
            parents={"checkpoint": source.hash, **source.parents},
            parameters={
                "target": "onnx",
                "precision": "fp32",
                "batch_sizes": BATCH_SIZES,
                "training": source.parameters,
            },
            metrics={"max_abs": receipt["max_abs"], "cosine": receipt["cosine"], "training": source.metrics},
        )
