"""Exported files compute what the checkpoint computes, at every batch size; what differs is not published."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from exporters import parity, repository
from exporters.cli import export
from exporters.onnx import BATCH_SIZES
from exporters.parity import ParityError
from exporters.repository import ExportOptions
from exporters.triton_config import config_pbtxt
from exporters.wrap import load_graphs
from model_factory import save_critic, save_policy
from recap_model.manifest import verify


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    checkpoints = [save_policy(root / "policy"), save_critic(root / "critic")]
    assert export([*map(str, checkpoints), "--out", str(root / "repo"), "--guided"]) == 0
    graphs = [g for c in checkpoints for g in load_graphs(c, guided=True)]
    return root, {g.name: g for g in graphs}


@pytest.mark.parametrize("name", ["policy", "policy_guided", "critic"])
@pytest.mark.parametrize("batch", BATCH_SIZES)
def test_onnx_equals_torch(exported, name, batch):
    root, graphs = exported
    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name("batch", batch)
    session = onnxruntime.InferenceSession(str(root / "repo" / name / "1" / "model.onnx"), options)
    inputs = graphs[name].example(batch, 77)  # a seed the exporter's own receipt has not used
    expected = graphs[name].run(inputs)
    for output, value in zip(graphs[name].outputs, session.run(list(graphs[name].outputs), inputs), strict=True):
        assert value.shape == expected[output].shape
        assert np.abs(value - expected[output]).max() < 1e-4


@pytest.mark.parametrize("name", ["policy", "policy_guided", "critic"])
def test_folder_is_complete_and_verified(exported, name):
    root, _ = exported
    folder = root / "repo" / name / "1"
    manifest = verify(folder, "model")
    assert {p.name for p in folder.iterdir()} == {
        "model.onnx", "spec.json", "tokenizer.json", "parity.json", "manifest.json",
    }  # fmt: skip
    assert b"site-packages" not in (folder / "model.onnx").read_bytes()  # no source lines of the exporting machine
    receipt = json.loads((folder / "parity.json").read_text())
    assert {row["batch"] for row in receipt["rows"]} == set(BATCH_SIZES)
    assert receipt["max_abs"] == manifest.metrics["max_abs"] <= 1e-4


@pytest.mark.parametrize("name", ["policy", "policy_guided", "critic"])
def test_triton_configuration_parses_back(exported, name):
    root, graphs = exported
    text = (root / "repo" / name / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    example = graphs[name].example(1, 0)
    assert config.name == name and config.max_batch_size == max(BATCH_SIZES)
    assert [i.name for i in config.input] == list(graphs[name].inputs)
    for tensor in config.input:
        shape = list(example[tensor.name].shape[1:])
        assert list(tensor.dims) == (shape or [1])
        assert tensor.HasField("reshape") == (not shape)


def test_a_graph_that_differs_is_not_published(exported, tmp_path, monkeypatch):
    """Export one set of weights and compare with another: above tolerance, nothing appears and the old model stays."""
    root, _ = exported
    other = load_graphs(save_policy(tmp_path / "other", seed=3), guided=False)[0]
    monkeypatch.setattr(repository, "export_onnx", lambda *_: onnx.load_from_string(_model(root)))
    with pytest.raises(ParityError, match=r"policy: expected max abs <= 0.0001 .* nothing was published"):
        repository._publish(other, tmp_path / "repo", ExportOptions())
    assert not list((tmp_path / "repo").iterdir())


def _model(root):
    return (root / "repo" / "policy" / "1" / "model.onnx").read_bytes()


def test_comparison_catches_nan_and_shape():
    ones = np.ones((2, 3))
    assert parity.compare(ones, np.full((2, 3), np.nan))["max_abs"] == float("inf")
    assert parity.compare(ones, np.ones((2, 4)))["max_abs"] == float("inf")
    assert parity.compare(ones, ones) == {"max_abs": 0.0, "cosine": pytest.approx(1.0)}


def test_unknown_tensor_type_is_refused():
    with pytest.raises(ValueError, match=r"expected one of .* got complex128"):
        config_pbtxt("x", {"a": np.zeros((1, 2), complex)}, {}, 8)


def test_a_guided_graph_never_outlives_its_policy(exported, tmp_path):
    root, _ = exported
    (tmp_path / "repo").mkdir()
    shutil.copytree(root / "repo" / "policy_guided", tmp_path / "repo" / "policy_guided")
    other = save_policy(tmp_path / "other", seed=4)
    assert export([str(other), "--out", str(tmp_path / "repo")]) == 0
    assert [p.name for p in (tmp_path / "repo").iterdir()] == ["policy"]
