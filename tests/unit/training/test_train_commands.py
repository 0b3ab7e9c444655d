"""`recap train critic`, `recap label`, `recap train policy` on a real dataset, at debug size."""

import json

import numpy as np
import pytest

from recap_model import cli
from recap_model.checkpoint import read_checkpoint
from recap_model.manifest import read_manifest, verify
from sample_rollouts import make_dataset
from trained import make_data
from training.dataset import open_dataset
from training.labels import load_labels, read_values


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """dataset/, returns/, critic/, values/, advantage/, sft/, recap/ made by the commands."""
    root = make_data(tmp_path_factory.mktemp("train"))
    dataset, debug = ["--dataset", str(root / "dataset")], ["--preset", "debug", "--steps", "6"]
    critic = ["train", "critic", *dataset, "--returns", str(root / "returns"), *debug, "--folds", "2"]
    assert cli.main([*critic, "--out", str(root / "critic"), "--values-out", str(root / "values")]) == 0
    label = ["label", *dataset, "--returns", str(root / "returns"), "--values", str(root / "values"), "--n", "4"]
    assert cli.main([*label, "--out", str(root / "advantage")]) == 0
    policy = ["train", "policy", *dataset, *debug]
    assert cli.main([*policy, "--mode", "imitation", "--out", str(root / "sft")]) == 0
    recap = ["--mode", "recap", "--labels", str(root / "advantage"), "--init", str(root / "sft")]
    assert cli.main([*policy, *recap, "--out", str(root / "recap")]) == 0
    return root


def test_every_folder_verifies_and_names_its_parents(run):
    dataset = open_dataset(run / "dataset").hash
    returns, critic, values, labels, sft = (
        verify(run / name).hash for name in ("returns", "critic", "values", "advantage", "sft")
    )
    assert read_manifest(run / "critic").parents == {"dataset": dataset, "returns": returns}
    assert read_manifest(run / "values").parents["critic"] == critic
    assert read_manifest(run / "advantage").parents["values"] == values
    assert read_manifest(run / "sft").parents == {"dataset": dataset}
    assert read_manifest(run / "recap").parents == {"dataset": dataset, "labels": labels, "init": sft}


def test_out_of_fold_values_cover_every_frame(run):
    dataset = open_dataset(run / "dataset")
    values = read_values(run / "values", dataset)
    assert np.isfinite(values.values).all() and ((values.values >= -1) & (values.values <= 0)).all()
    fold_of_episode = [set(values.fold[dataset.keys()[0] == e.index]) for e in dataset.episodes]
    assert all(len(folds) == 1 for folds in fold_of_episode) and set().union(*fold_of_episode) == {0, 1}
    report = read_manifest(run / "critic").metrics
    assert report["episodes"] == len(dataset.episodes) and 0 <= report["auc_50"] <= 1


def test_recap_trains_on_the_labels_and_imitation_takes_all_as_positive(run):
    share = read_manifest(run / "recap").metrics["indicator_share"]
    labels = load_labels(run / "advantage", open_dataset(run / "dataset"))
    assert share["1"] == pytest.approx((labels.indicator == 1).mean()) and share["1"] > 0
    assert read_manifest(run / "sft").metrics["indicator_share"] == {"-1": 0.0, "0": 0.0, "1": 1.0}


def test_the_filtered_control_trains_on_the_positive_frames_alone(run, tmp_path):
    command = ["train", "policy", "--dataset", str(run / "dataset"), "--preset", "debug", "--steps", "2"]
    labels = ["--mode", "filtered", "--labels", str(run / "advantage"), "--init", str(run / "sft")]
    assert cli.main([*command, *labels, "--batch-size", "4", "--out", str(tmp_path / "filtered")]) == 0
    positives = (load_labels(run / "advantage", open_dataset(run / "dataset")).indicator == 1).sum()
    assert read_manifest(tmp_path / "filtered").metrics["epochs"] == pytest.approx(8 / positives)


def test_checkpoint_loads_from_its_path_and_keeps_spec_and_statistics(run):
    from recap_model.policy.load import load_policy

    policy, files = load_policy(run / "recap")
    assert files.spec.robot.tasks == ("close it", "open it") and files.spec.chunk == policy.config.chunk == 8
    assert policy.config.vision.image_size == 32
    np.testing.assert_array_equal(files.stats["state"].mean, read_checkpoint(run / "sft", "policy").stats["state"].mean)
    lines = (run / "recap" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6


def failing(capsys, *argv):
    assert cli.main(list(argv)) == 2
    return " ".join(capsys.readouterr().err.split())


def test_modes_and_labels_must_agree(run, tmp_path, capsys):
    base = ["train", "policy", "--dataset", str(run / "dataset"), "--out", str(tmp_path / "x")]
    assert "mode 'recap' needs a label folder (made by `recap label`), got none" in failing(capsys, *base)
    said = failing(capsys, *base, "--mode", "imitation", "--labels", str(run / "advantage"))
    assert "mode 'imitation' takes no labels" in said


def test_a_critic_is_no_policy(run, tmp_path, capsys):
    base = ["train", "policy", "--dataset", str(run / "dataset"), "--mode", "imitation", "--preset", "debug"]
    said = failing(capsys, *base, "--init", str(run / "critic"), "--out", str(tmp_path / "x"))
    assert "kind: expected 'policy', got 'critic'" in said


def test_cameras_of_different_sizes_are_refused(tmp_path, capsys):
    dataset = make_dataset(tmp_path)
    base = ["train", "policy", "--dataset", str(dataset), "--mode", "imitation", "--preset", "debug"]
    said = failing(capsys, *base, "--out", str(tmp_path / "x"))
    assert "expected square frames of one size" in said and "front 12x16, top 10x10" in said


def test_unknown_preset_suggests_one(run, tmp_path, capsys):
    base = ["train", "policy", "--dataset", str(run / "dataset"), "--mode", "imitation", "--preset", "tinny"]
    assert "did you mean 'tiny'?" in failing(capsys, *base, "--out", str(tmp_path / "x"))
