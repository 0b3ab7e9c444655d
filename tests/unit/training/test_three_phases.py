"""Pre-training on two robots, imitation on one, improvement from its rollouts: the commands of docs/training.md."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recap_model import conditioning
from recap_model.cli import main
from recap_model.manifest import read_manifest, verify
from recap_model.policy.load import load_policy
from training import presets
from training.dataset import open_dataset
from training.labels import load_labels
from training.prepare import prepare
from two_robots import ARM, CART, make_dataset

FIT = ("--preset", "pretrain_debug", "--steps", "3", "--batch-size", "8")


def recap(*argv: object) -> None:
    assert main([str(word) for word in argv]) == 0, argv


def value_labels(folder: Path, data: Path, *label: object, init: Path | None = None) -> None:
    """folder/{returns,critic,values,advantage} of the dataset at `data`."""
    parts = {name: folder / name for name in ("returns", "critic", "values", "advantage")}
    recap("returns", "--dataset", data, "--out", parts["returns"])
    start = () if init is None else ("--init", init)
    critic = ("train", "critic", "--dataset", data, "--returns", parts["returns"], "--out", parts["critic"])
    recap(*critic, "--values-out", parts["values"], *FIT, *start)
    judged = ("label", "--dataset", data, "--returns", parts["returns"], "--values", parts["values"])
    recap(*judged, "--out", parts["advantage"], *label)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """pre/<robot>/{dataset,critic,advantage}, pre/policy, sft, now/{dataset,critic,advantage}, improved."""
    root = tmp_path_factory.mktemp("phases")
    for robot in (ARM, CART):
        own = root / "pre" / robot.robot
        make_dataset(own, robot)
        value_labels(own, own / "dataset", "--n", "episode")
    entries = [
        f'[[datasets]]\nname = "{r}"\ndataset = "{r}/dataset"\nlabels = "{r}/advantage"\nweight = {w}\n'
        for r, w in (("arm", 2), ("cart", 1))
    ]
    (root / "pre" / "mixture.toml").write_text("\n".join(entries))
    recap("train", "policy", "--mixture", root / "pre" / "mixture.toml", "--out", root / "pre" / "policy", *FIT)

    demonstrations, start = root / "pre" / "arm" / "dataset", ("--init", root / "pre" / "policy")
    recap("train", "policy", "--dataset", demonstrations, "--expert", *start, "--out", root / "sft", *FIT)

    make_dataset(root / "pre" / "arm", ARM, (9, 5, 8), first=3, name="union")
    union = root / "pre" / "arm" / "union"
    value_labels(root / "now", union, "--n", "50", init=root / "pre" / "arm" / "critic")
    improve = ("--labels", root / "now" / "advantage", "--cotrain-share", "0.25")
    recap("train", "policy", "--dataset", union, *start, *improve, "--out", root / "improved", *FIT)
    return root


def test_every_stage_names_what_it_was_made_from(root):
    pre, arm = verify(root / "pre" / "policy"), root / "pre" / "arm"
    for robot in ("arm", "cart"):
        own = root / "pre" / robot
        assert pre.parents[f"dataset/{robot}"] == open_dataset(own / "dataset").hash
        assert pre.parents[f"labels/{robot}"] == read_manifest(own / "advantage").hash
    assert verify(root / "sft").parents == {"dataset": open_dataset(arm / "dataset").hash, "init": pre.hash}
    assert verify(root / "now" / "critic").parents["init"] == read_manifest(arm / "critic").hash
    improved = verify(root / "improved")
    assert improved.parents == {
        "dataset": open_dataset(arm / "union").hash,
        "labels": read_manifest(root / "now" / "advantage").hash,
        "init": pre.hash,  # from the pre-trained checkpoint, not from the last policy: no drift (section V-D)
    }
    assert improved.parameters["cotrain_share"] == 0.25


def test_labels_of_pre_training_look_to_the_end_and_those_of_improvement_fifty_frames(root):
    before, now = (read_manifest(root / name / "advantage").parameters for name in ("pre/arm", "now"))
    assert (before["n"], before["demonstration_fraction"]) == (None, 0.3)
    assert (now["n"], now["positive_fraction"], now["interventions"]) == (50, 0.4, "all")
    union = open_dataset(root / "pre" / "arm" / "union")
    labels = load_labels(root / "now" / "advantage", union)
    human = np.concatenate([episode.intervention for episode in union.episodes])
    assert human.sum() == 3 and (labels.indicator[human] == conditioning.POSITIVE).all()
    assert set(labels.indicator) == {conditioning.POSITIVE, conditioning.NEGATIVE}


def test_imitation_says_positive_everywhere(root):
    assert read_manifest(root / "sft").metrics["indicator_share"] == {"-1": 0.0, "0": 0.0, "1": 1.0}
    shares = read_manifest(root / "pre" / "policy").metrics["datasets"]
    assert shares["arm"]["share"] == pytest.approx(2 / 3) and 0 < shares["arm"]["positive_share"] < 1


def test_the_statistics_are_those_of_pre_training_all_along(root):
    first = load_policy(root / "pre" / "policy")[1].stats
    for name in ("sft", "improved"):
        policy, files = load_policy(root / name)
        for kind in ("state", "action"):
            np.testing.assert_array_equal(files.stats[kind].mean, first[f"arm/{kind}"].mean)
        assert (policy.config.padded_state, policy.config.padded_action) == (32, 32)
        ids, mask = files.tokenizer(conditioning.positive_prompt(ARM.tasks[0]))
        inputs = (np.zeros((1, 2, 32, 32, 3), np.uint8), np.zeros((1, 3), np.float32), ids[None], mask[None])
        actions = policy.sample_actions(*(torch.from_numpy(x) for x in inputs), torch.zeros(1, 8, 32))
        assert actions.shape == (1, 8, 3) and bool(actions.isfinite().all())


def test_every_batch_of_the_improvement_has_its_share_of_demonstrations(root):
    data, labels = root / "pre" / "arm" / "union", root / "now" / "advantage"
    base = presets.load("pretrain_debug").policy()
    options = replace(base, cotrain_share=0.25, fit=replace(base.fit, batch_size=8))
    run = prepare(options, data, labels, root / "pre" / "policy", "recap")
    shown = {episode.index for episode in open_dataset(data).episodes if episode.demonstration}
    assert shown == {0, 2, 4}
    seen = [[int(e) in shown for e in run.table.episode[run.rows(step)]] for step in range(12)]
    assert [sum(batch) for batch in seen] == [2] * 12 and {len(batch) for batch in seen} == {8}


@pytest.mark.parametrize(
    "argv, said",
    [
        (("--cotrain-share", "1.0"), "cotrain share: expected a share between 0 and 1 (both excluded), got 1.0"),
        (("--cotrain-share", "0.5", "--positive-share", "0.5"), "--cotrain-share: expected no other rule"),
        (("--cotrain-share", "0.5", "--mode", "filtered"), "got --mode filtered"),
    ],
)
def test_shares_that_mean_nothing_are_refused(root, capsys, argv, said):
    data = ("--dataset", str(root / "pre" / "arm" / "union"), "--labels", str(root / "now" / "advantage"))
    assert main(["train", "policy", *data, *FIT, "--out", str(root / "x"), *argv]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_demonstrations_alone_cannot_be_mixed_with_rollouts(tmp_path, capsys):
    data = make_dataset(tmp_path, CART, (5,))
    command = ["train", "policy", "--dataset", str(data), "--expert", "--cotrain-share", "0.5", *FIT]
    assert main([*command, "--out", str(tmp_path / "x")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "cotrain share: expected demonstration and rollout frames in the data, got no rollout one" in said


def test_mixture_json_holds_no_paths(root):
    text = (root / "pre" / "policy" / "mixture.json").read_text()
    assert str(root) not in text and [d["labels"] for d in json.loads(text)["datasets"]] == [
        read_manifest(root / "pre" / robot / "advantage").hash for robot in ("arm", "cart")
    ]
