"""Number formats, real-time chunking and the operator audit of exported SmolVLA graphs, by the real runtime."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from exporters.audit import AuditError, audit, drop_unused_outputs
from exporters.cli import export
from exporters.onnx import save_onnx
from exporters.precision import PrecisionError, require_precision, weight_formats
from exporters.repository import ExportOptions
from exporters.wrap import load_graphs
from model_factory import ROBOT, SMOLVLA, STATS, TOKENIZER
from recap_model.manifest import publish, verify, write_manifest
from recap_model.policy.model import Policy
from recap_model.spec import PolicySpec
from training.checkpoint import write_checkpoint


def save_smolvla(folder, config=SMOLVLA):
    torch.manual_seed(0)
    policy = Policy(config, STATS)
    weights = {k: v.detach() for k, v in policy.named_parameters()}
    with publish(folder) as tmp:
        write_checkpoint(tmp, weights, config.to_json(), PolicySpec(ROBOT, 8, 16), TOKENIZER, STATS)
        write_manifest(tmp, "policy")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_smolvla(tmp_path_factory.mktemp("smolvla") / "policy")


def run(path, inputs, batch):
    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name("batch", batch)
    return onnxruntime.InferenceSession(str(path), options).run(None, inputs)[0]


@pytest.mark.parametrize("precision, limit", [("fp32", 1e-4), ("fp16", 0.02), ("int8", 0.3)])
def test_formats_hold_what_they_say_and_stay_close(checkpoint, tmp_path, precision, limit):
    repo = tmp_path / "repo"
    arguments = [str(checkpoint), "--out", str(repo), "--precision", precision, "--batch-sizes", "1", "2"]
    assert export(arguments) == 0
    for graph in load_graphs(checkpoint, guided=False):
        folder = repo / graph.name / "1"
        manifest = verify(folder, "model")
        model = onnx.load(folder / "model.onnx")
        assert weight_formats(model)[precision] > 0.9
        assert manifest.parameters["precision"] == precision and manifest.parameters["batch_sizes"] == [1, 2]
        assert manifest.parameters["operators"]["MatMul"] > 0
        inputs = graph.example(2, 77)
        difference = np.abs(run(folder / "model.onnx", inputs, 2) - graph.run(inputs)["actions"]).max()
        assert difference < limit and (precision == "fp32" or difference > 1e-5)
        receipt = json.loads((folder / "parity.json").read_text())
        assert receipt["max_abs"] == manifest.metrics["max_abs"] < limit
        assert not list(folder.glob("fp32*"))


@pytest.mark.parametrize("guided, max_delay", [(False, 0), (False, 5), pytest.param(True, 5, marks=pytest.mark.slow)])
def test_chunking_inputs_go_through_the_exported_graph(checkpoint, tmp_path, guided, max_delay):
    if max_delay:
        checkpoint = save_smolvla(tmp_path / "with delays", replace(SMOLVLA, max_delay=max_delay))
    options = ["--rtc", "--batch-sizes", "2", *(["--guided"] if guided else [])]
    assert export([str(checkpoint), "--out", str(tmp_path), *options]) == 0
    graph = load_graphs(checkpoint, guided=guided, rtc=True)[-1]
    path, inputs = tmp_path / graph.name / "1" / "model.onnx", graph.example(2, 5)
    held = run(path, inputs, 2)
    assert np.abs(held - graph.run(inputs)["actions"]).max() < 1e-4
    exact = inputs["prefix_weights"] == 1
    assert (np.abs(held - inputs["previous"])[exact].max() < 1e-4) == bool(max_delay)
    off = {**inputs, **{n: np.zeros_like(inputs[n]) for n in ("previous", "prefix_weights", "guidance_weights")}}
    plain = load_graphs(checkpoint, guided=guided)[-1]
    free = plain.run({name: inputs[name] for name in plain.inputs})["actions"]
    assert np.abs(run(path, off, 2) - free).max() < 1e-4 < np.abs(held - free).max()


def test_the_graph_for_tensorrt_has_standard_operators_alone(checkpoint, tmp_path):
    from exporters.onnx import export_onnx

    graph = load_graphs(checkpoint, guided=False, dtype=torch.float16)[0]
    model = export_onnx(graph, tmp_path / "model.onnx")
    drop_unused_outputs(model)
    counts = audit(model, "tensorrt")
    assert not {"Loop", "If", "Resize", "ScatterND", "Sin", "Cos"} & set(counts)
    inputs = graph.example(1, 4)
    save_onnx(model, tmp_path / "model.onnx")
    assert np.abs(run(tmp_path / "model.onnx", inputs, 1) - graph.run(inputs)["actions"]).max() < 0.02


def test_large_weights_lie_beside_the_graph(checkpoint, tmp_path, monkeypatch):
    from exporters import onnx as exporter

    monkeypatch.setattr(exporter, "EXTERNAL_ABOVE", 1000)
    graph = load_graphs(checkpoint, guided=False)[0]
    model = exporter.export_onnx(graph, tmp_path / "model.onnx")
    alone = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    beside = [item for item in alone.graph.initializer if item.data_location == TensorProto.EXTERNAL]
    assert len(beside) > 20 and max(len(item.raw_data) for item in alone.graph.initializer) <= 1024
    assert all(item.raw_data or not item.dims for item in model.graph.initializer)
    inputs = graph.example(1, 0)
    assert np.abs(run(tmp_path / "model.onnx", inputs, 1) - graph.run(inputs)["actions"]).max() < 1e-4


def small(nodes, weights=(), opsets=(("", 18),)):
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4])  # noqa: E731
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*o) for o in opsets])


WEIGHT = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
PRODUCT = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")


@pytest.mark.parametrize(
    "node, runtime, message",
    [
        (helper.make_node("NonZero", ["x"], ["y"], name="n"), "onnxruntime", r"NonZero \(n\): its output shape"),
        (helper.make_node("Resize", ["x"], ["y"]), "tensorrt", r"Resize \(unnamed\): runtimes disagree"),
        (helper.make_node("SplitToSequence", ["x"], ["y"]), "tensorrt", "sequences stop graph capture"),
        (helper.make_node("MultiHeadAttention", ["x"], ["y"], domain="com.microsoft"), "tensorrt", "com.microsoft"),
        (helper.make_node("Cast", ["x"], ["y"], to=TensorProto.DOUBLE), "onnxruntime", "fp64 has no kernels"),
        (helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16), "onnxruntime", "no bf16 arithmetic"),
        (helper.make_node("LayerNormalization", ["x", "w"], ["y", "m", "d"]), "tensorrt", "expected one output, got 3"),
    ],
)
def test_audit_refuses_what_runtimes_reject(node, runtime, message):
    with pytest.raises(AuditError, match=message):
        audit(small([node], [WEIGHT]), runtime)


def test_audit_counts_what_is_there_and_a_bool_is_not_summed():
    assert audit(small([PRODUCT], [WEIGHT]), "tensorrt") == {"MatMul": 1}
    nodes = [helper.make_node("Not", ["b"], ["c"]), helper.make_node("CumSum", ["c", "a"], ["y"], name="sum")]
    with pytest.raises(AuditError, match=r"CumSum \(sum\): of a bool"):
        audit(small(nodes), "onnxruntime")


def test_a_format_in_name_alone_is_refused():
    model = small([PRODUCT], [WEIGHT])
    assert require_precision(model, "fp32") == {"fp32": 1.0}
    with pytest.raises(PrecisionError, match="expected at least 90% of the weights in int8, got fp32 100%"):
        require_precision(model, "int8")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_sizes": (1, 16)}, r"batch_sizes: expected numbers from 1 to 8, got \(1, 16\)"),
        ({"target": "torch", "precision": "int8"}, "int8 is for --target onnx"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExportOptions(**options)
