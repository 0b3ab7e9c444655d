"""Checkpoints -> model repository: `<name>/config.pbtxt` and `<name>/<version>/`, published whole or not at all."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from exporters.audit import audit, drop_unused_outputs
from exporters.onnx import BATCH_SIZES, export_onnx, save_onnx
from exporters.parity import Tolerance, compare, judge, onnx_parity
from exporters.precision import Precision, quantize_int8, require_precision
from exporters.triton_config import Arrays, TritonOptions
from exporters.triton_repository import require_same_tensors, write_backend, write_configuration
from exporters.wrap import Graph, load_graphs
from recap_model.manifest import Manifest, publish, write_manifest
from recap_model.policy.static import StaticPolicy
from recap_model.spec import write_spec

VERSION = "1"
Target = Literal["onnx", "torch", "tensorrt"]
_BACKENDS = {"onnx": ("onnxruntime", "python"), "tensorrt": ("tensorrt",)}  # of Triton
_LARGE = 100_000_000  # numbers in a model above which one seed has to do for the receipt


@dataclass(frozen=True)
class ExportOptions:
    """target: what is written. precision: of a policy's matrix products; critics stay in fp32.

    guided: also `policy_guided`. rtc: with the inputs of real-time chunking. batch_sizes: what engines will serve, and
    what the receipt covers. max_abs: largest accepted difference from torch in action units, None = by precision.
    triton: how Triton runs it, None = by the backend of the target. version: added beside the model's other versions;
    None = version 1 in their place.
    """

    target: Target = "onnx"
    precision: Precision = "fp32"
    guided: bool = False
    rtc: bool = False
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    max_abs: float | None = None
    triton: TritonOptions | None = None
    version: int | None = None

    def __post_init__(self) -> None:
        wrong = [size for size in self.batch_sizes if not 1 <= size <= max(BATCH_SIZES)]
        if wrong or not self.batch_sizes:
            raise ValueError(f"batch_sizes: expected numbers from 1 to {max(BATCH_SIZES)}, got {self.batch_sizes}")
        if self.target != "onnx" and self.precision == "int8":
            raise ValueError(f"precision: int8 is for --target onnx (the CPU), got --target {self.target}")
        if self.triton is not None and self.target == "torch":
            raise ValueError("target torch: expected no options for Triton: only `recap serve --engine torch` runs it")
        if self.triton is not None and self.triton.backend not in _BACKENDS[self.target]:
            raise ValueError(
                f"backend: expected one of {', '.join(_BACKENDS[self.target])} for --target {self.target}, "
                f"got {self.triton.backend}"
            )
        if self.version is not None and self.version < 1:
            raise ValueError(f"version: expected a number from 1, got {self.version}")

    @property
    def triton_options(self) -> TritonOptions:
        """How Triton runs it."""
        return self.triton or TritonOptions("tensorrt" if self.target == "tensorrt" else "onnxruntime")


def export_checkpoint(checkpoint: Path, out: Path, options: ExportOptions) -> list[Manifest]:
    """Export every graph of `checkpoint` into the repository `out`; the other models in it stay."""
    half = options.precision == "fp16" or options.target == "tensorrt"
    graphs = load_graphs(
        checkpoint,
        guided=options.guided,
        rtc=options.rtc,
        dtype=torch.float16 if half and options.target != "torch" else torch.float32,
        attention="onnxruntime" if options.target == "onnx" else "matmul",
    )
    distilled = graphs[0].files.manifest.parameters
    if options.guided and distilled.get("mode") == "distilled":
        raise ValueError(
            f"{checkpoint}: expected no --guided for a distilled policy: the guidance of its teacher (beta "
            f"{distilled.get('beta')}) is in its weights, and would be applied twice"
        )
    if any(graph.name == "policy" for graph in graphs):
        # never beside a policy of another checkpoint: `recap serve --beta` would take it for this one's
        if options.version is None:
            shutil.rmtree(out / "policy_guided", ignore_errors=True)
        elif (out / "policy_guided").is_dir() and not options.guided:
            raise ValueError(f"{out}: has a policy_guided: expected --guided too, for version {options.version} of it")
    return [_publish(graph, out, options) for graph in graphs]


def _publish(graph: Graph, out: Path, options: ExportOptions) -> Manifest:
    model, inputs = out / graph.name, graph.example(1, 0)
    outputs = graph.run(inputs)
    if options.version is None:
        with publish(model) as folder:
            (folder / VERSION).mkdir()
            manifest = _fill(graph, folder / VERSION, options)
            _configure(graph.name, folder, inputs, outputs, options)
        return manifest
    require_same_tensors(model, inputs, outputs)
    with publish(model / str(options.version)) as version:
        manifest = _fill(graph, version, options)
    _configure(graph.name, model, inputs, outputs, options)
    return manifest


def _configure(name: str, folder: Path, inputs: Arrays, outputs: Arrays, options: ExportOptions) -> None:
    if options.target != "torch":
        write_configuration(folder, inputs, outputs, options.batch_sizes, options.triton_options, name)


def _fill(graph: Graph, version: Path, options: ExportOptions) -> Manifest:
    """Everything of a version folder."""
    write = {"onnx": _write_onnx, "torch": _write_torch, "tensorrt": _write_tensorrt}[options.target]
    receipt, extra = write(graph, version, options)
    (version / "parity.json").write_text(json.dumps(receipt, indent=1) + "\n")
    write_spec(graph.files.spec, version / "spec.json")
    graph.files.tokenizer.save(version / "tokenizer.json")
    write_backend(version, options.triton_options)
    source = graph.files.manifest
    return write_manifest(
        version,
        "model",
        parents={"checkpoint": source.hash, **source.parents},
        parameters={
            "target": options.target,
            "precision": _precision(graph, options),
            "batch_sizes": options.batch_sizes,
            "rtc": options.rtc,
            "training": source.parameters,
            **extra,
        },
        metrics={"max_abs": receipt["max_abs"], "cosine": receipt["cosine"], "training": source.metrics},
    )


def _precision(graph: Graph, options: ExportOptions) -> Precision:
    return options.precision if isinstance(graph.module, StaticPolicy) else "fp32"


Written = tuple[dict[str, Any], dict[str, Any]]  # parity receipt, parameters for the manifest


def _write_onnx(graph: Graph, version: Path, options: ExportOptions) -> Written:
    """`model.onnx`, audited, its weights in the precision that its name says, and compared with torch."""
    precision, path = _precision(graph, options), version / "model.onnx"
    if precision == "int8":
        scratch = version / "fp32.onnx"
        export_onnx(graph, scratch)
        model = quantize_int8(scratch, path)
        for file in version.glob("fp32.onnx*"):
            file.unlink()
    else:
        model = export_onnx(graph, path)
    drop_unused_outputs(model)
    operators = audit(model, "onnxruntime")
    weights = require_precision(model, precision) if isinstance(graph.module, StaticPolicy) else {}
    save_onnx(model, path)
    seeds = 1 if sum(p.numel() for p in graph.module.buffers()) > _LARGE else 3
    receipt = onnx_parity(graph, path, options.batch_sizes, Tolerance.of(precision, options.max_abs), seeds)
    return receipt, {"operators": operators, "weights": weights}


def _write_torch(graph: Graph, version: Path, options: ExportOptions) -> Written:
    """What `recap serve --engine torch` builds its graph from."""
    from exporters.torch_graph import write_torch

    write_torch(graph, version)
    rows = []
    for batch in options.batch_sizes:
        inputs = graph.example(batch, 0)
        expected = graph.run(inputs)
        with torch.no_grad():
            got = graph.module(*(torch.from_numpy(inputs[name]) for name in graph.inputs)).numpy()
        rows.append({"batch": batch, "seed": 0, "output": "actions", **compare(expected["actions"], got)})
    receipt = judge(graph.name, rows, Tolerance.of("fp32", options.max_abs))
    return {"engine": f"torch {torch.__version__}, static graph in fp32", **receipt}, {}


def _write_tensorrt(graph: Graph, version: Path, options: ExportOptions) -> Written:
    """`model.plan` for the GPU of this machine, built from the audited fp16 graph."""
    from exporters.tensorrt import build_plan

    receipt, extra = _write_onnx_for_tensorrt(graph, version, options)
    profiles = ((1, 1, max(options.batch_sizes)),)
    extra["tensorrt"] = build_plan(version / "model.onnx", version / "model.plan", profiles, version / "timing.cache")
    return receipt, extra


def _write_onnx_for_tensorrt(graph: Graph, version: Path, options: ExportOptions) -> Written:
    path = version / "model.onnx"
    model = drop_unused_outputs(export_onnx(graph, path))
    operators = audit(model, "tensorrt")
    save_onnx(model, path)
    receipt = onnx_parity(graph, path, options.batch_sizes, Tolerance.of("fp16", options.max_abs), 1)
    return receipt, {"operators": operators}
