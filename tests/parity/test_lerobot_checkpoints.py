"""Checkpoints across the border: LeRobot's folders in, ours out, and the same physical actions on both sides."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import NormalizationMode
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from safetensors.torch import load_file, save_file

from lerobot_checkpoints import (
    CAMERAS,
    FRAME,
    TASK,
    assert_same,
    assert_same_checkpoint,
    edit,
    open_theirs,
    our_actions,
    raw,
    save,
    statistics,
    their_actions,
)
from lerobot_smolvla import lerobot_policy, write_vlm
from recap_model import conditioning
from recap_model.checkpoint import read_checkpoint
from recap_model.cli import main
from recap_model.manifest import verify
from recap_model.policy.load import load_policy
from recap_model.policy.sizes import smolvla_base
from trained import SPEC
from training import presets
from training.lerobot_export import lerobot_weights
from training.loop import autocast_vision


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "policy"
    command = ["train", "policy", "--dataset", str(data / "dataset"), "--out", str(out), "--mode", "imitation"]
    assert main([*command, "--preset", "smolvla_debug", "--steps", "4"]) == 0
    return out


def test_an_imported_policy_acts_as_it_did_in_lerobot(theirs, imported):
    images, state = raw(CAMERAS, FRAME, 5)
    noise = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2))
    want = their_actions(theirs, images, state, TASK, noise)
    assert_same(our_actions(imported, images, state, conditioning.unconditional_prompt(TASK), noise), want)


def test_what_the_import_derives(imported, theirs):
    files, stats = read_checkpoint(imported, "policy"), statistics()["action"]
    robot = files.spec.robot
    assert (robot.camera_names, robot.control_hz, robot.tasks) == (CAMERAS, 30.0, (TASK, "close it"))
    assert [d.name for d in robot.state] == [f"state_{i}" for i in range(5)]
    torch.testing.assert_close(
        torch.tensor([[d.low, d.high] for d in robot.action]).T, torch.stack([stats["min"], stats["max"]])
    )
    assert files.manifest.parameters == {"positions": "float32", "format": "lerobot"}
    for path in imported.glob("*.json"):
        assert str(theirs.parent) not in path.read_text(), path


@pytest.mark.parametrize("mode", ["MIN_MAX", "QUANTILES"])
def test_the_normalisation_of_the_processors_counts(theirs, tmp_path, mode):
    """Also where a state or action dimension never moved."""
    policy, _, _ = open_theirs(theirs)
    policy.config.normalization_mapping |= {"STATE": NormalizationMode(mode), "ACTION": NormalizationMode(mode)}
    stats = statistics()
    for key in stats:
        for high, low in (("max", "min"), ("q99", "q01")):
            stats[key][high][1] = stats[key][low][1]
    folder = save(policy, tmp_path / "policy", stats)
    out, back = tmp_path / "checkpoint", tmp_path / "back"
    assert main(["import-lerobot", str(folder), "--out", str(out), "--fps", "30"]) == 0
    images, state = raw(CAMERAS, FRAME, 5)
    low = "min" if mode == "MIN_MAX" else "q01"
    state[1] = stats["observation.state"][low][1]
    noise = torch.randn(1, 6, 32)
    want = their_actions(folder, images, state, TASK, noise)
    assert_same(our_actions(out, images, state, f"{TASK}\n", noise), want)
    assert main(["export-lerobot", str(out), "--out", str(back)]) == 0
    assert_same(their_actions(back, images, state, TASK, noise), want)


def test_a_trained_policy_acts_in_lerobot_as_here(trained, tmp_path, capsys):
    folder = tmp_path / "exported"
    assert main(["export-lerobot", str(trained), "--out", str(folder)]) == 0
    assert f"vlm_model_name is the path {folder / 'vlm'}" in capsys.readouterr().out
    images, state = raw(SPEC.camera_names, (32, 32), 2, seed=4)
    noise = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(3))
    for task in SPEC.tasks:
        prompt = conditioning.positive_prompt(task)
        assert_same(
            our_actions(trained, images, state, prompt, noise), their_actions(folder, images, state, prompt, noise)
        )


def test_import_of_an_export_is_the_same_checkpoint(imported, trained, tmp_path):
    for number, checkpoint in enumerate((imported, trained)):
        folder, again = tmp_path / f"folder{number}", tmp_path / f"again{number}"
        assert main(["export-lerobot", str(checkpoint), "--out", str(folder)]) == 0
        assert main(["import-lerobot", str(folder), "--out", str(again)]) == 0
        # a vocabulary of our own gets SmolVLM2's special tokens on the way; the ids of words stay
        assert_same_checkpoint(checkpoint, again, tokenizer=checkpoint == imported)
        before, after = (read_checkpoint(path, "policy").tokenizer for path in (checkpoint, again))
        for text in (conditioning.positive_prompt(SPEC.tasks[0]), f"{TASK}\n"):
            assert np.array_equal(before(text), after(text))


def test_an_exported_folder_can_move(imported, tmp_path):
    assert main(["export-lerobot", str(imported), "--out", str(tmp_path / "folder")]) == 0
    (tmp_path / "folder").rename(tmp_path / "moved")
    assert main(["import-lerobot", str(tmp_path / "moved"), "--out", str(tmp_path / "again")]) == 0
    assert_same_checkpoint(imported, tmp_path / "again")


def test_a_hub_name_is_remembered_and_written_back(theirs, tmp_path):
    folder = shutil.copytree(theirs, tmp_path / "policy")
    edit(folder / "config.json", vlm_model_name="someone/smolvlm2")
    vlm = str(theirs.parent / "vlm")
    out, back = tmp_path / "checkpoint", tmp_path / "back"
    assert main(["import-lerobot", str(folder), "--out", str(out), "--fps", "30", "--vlm", vlm]) == 0
    assert verify(out).parameters["vlm_name"] == "someone/smolvlm2"
    for extra, name in (([], "someone/smolvlm2"), (["--vlm-name", vlm], vlm)):
        assert main(["export-lerobot", str(out), "--out", str(back), *extra]) == 0
        assert json.loads((back / "config.json").read_text())["vlm_model_name"] == name
        assert not (back / "vlm").exists()
    open_theirs(back)


def test_a_policy_without_the_head_gets_one(trained):
    """The head reaches no action: LeRobot wants one all the same."""
    weights = load_file(trained / "model.safetensors")
    full = lerobot_weights(weights)
    bare = {name: t for name, t in weights.items() if not name.startswith(("language.norm", "language.head"))}
    assert lerobot_weights(bare).keys() == full.keys()
    embedding = lerobot_weights(bare)["model.vlm_with_expert.vlm.lm_head.weight"]
    assert torch.equal(embedding, weights["language.embed.weight"])


def test_training_goes_on_from_an_imported_policy_and_the_expert_alone_moves(data, tmp_path):
    """Frames of any shape, the dataset's robot, and with --train expert a tower and a language model that stay."""
    vlm = write_vlm(tmp_path / "vlm", layers=4, vision_layers=2)
    policy = lerobot_policy(vlm, frame=FRAME, num_vlm_layers=4)
    policy.config.input_features["observation.state"].shape = (2,)
    policy.config.output_features["action"].shape = (2,)
    stats = {key: {n: t[:2] for n, t in value.items()} for key, value in statistics().items()}
    folder, start, out = save(policy, tmp_path / "lerobot", stats), tmp_path / "start", tmp_path / "out"
    dataset = ["--dataset", str(data / "dataset")]
    cameras = ["--cameras", *(f"c{i}={name}" for i, name in enumerate(SPEC.camera_names))]
    assert main(["import-lerobot", str(folder), "--out", str(start), *dataset, *cameras]) == 0
    robot = read_checkpoint(start, "policy").spec.robot
    assert (robot.camera_names, robot.state, set(robot.tasks)) == (SPEC.camera_names, SPEC.state, set(SPEC.tasks))
    command = ["train", "policy", *dataset, "--out", str(out), "--mode", "imitation", "--init", str(start)]
    assert main([*command, "--preset", "smolvla_debug", "--steps", "3", "--train", "expert"]) == 0
    before, after = load_file(start / "model.safetensors"), load_file(out / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(("expert.", "state_in.")) for name in moved)
    assert {"state_in.weight", "expert.action_in.weight", "expert.layers.1.k.weight"} <= moved
    assert read_checkpoint(out, "policy").manifest.parameters["train"] == "expert"


def test_the_large_preset_is_lerobots_layout_and_optimiser():
    settings, sizes, defaults = presets.load("smolvla_base").policy(), smolvla_base(2, 5, 4), SmolVLAConfig()
    for name in ("vision", "language", "expert", "chunk", "max_tokens", "denoise_steps", "state_width", "action_width"):
        assert getattr(settings, name) == getattr(sizes, name), name
    ours, adam, schedule = settings.fit.optim, defaults.get_optimizer_preset(), defaults.get_scheduler_preset()
    assert (ours.lr, (ours.beta1, ours.beta2), ours.weight_decay) == (adam.lr, adam.betas, adam.weight_decay)
    assert (ours.clip, ours.warmup, ours.ema) == (adam.grad_clip_norm, schedule.num_warmup_steps, 0.0)
    assert ours.lr * ours.final == pytest.approx(schedule.decay_lr)


def test_bfloat16_is_for_the_convolutional_tower_on_a_cpu(trained):
    policy, _ = load_policy(trained)
    with autocast_vision(policy):
        assert not torch.is_autocast_enabled("cpu")
    policy.vision = torch.nn.Identity()
    with autocast_vision(policy):
        assert torch.is_autocast_enabled("cpu")


def test_all_of_a_policy_is_trained_by_default(trained, data, tmp_path):
    out = tmp_path / "more"
    command = ["train", "policy", "--dataset", str(data / "dataset"), "--out", str(out), "--mode", "imitation"]
    assert main([*command, "--preset", "smolvla_debug", "--steps", "2", "--init", str(trained)]) == 0
    before, after = load_file(trained / "model.safetensors"), load_file(out / "model.safetensors")
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"vision", "language", "state_in", "expert"}


def test_statistics_among_the_weights_of_old_checkpoints(theirs, imported, tmp_path, capsys):
    folder = shutil.copytree(theirs, tmp_path / "old", ignore=shutil.ignore_patterns("policy_p*"))
    stats, tensors = statistics(), load_file(theirs / "model.safetensors")
    buffers = {"normalize_inputs.buffer_observation_state": "observation.state"}
    buffers |= {"unnormalize_outputs.buffer_action": "action", "normalize_targets.buffer_action": "action"}
    for prefix, key in buffers.items():
        tensors |= {f"{prefix}.{name}": stats[key][name].clone() for name in ("mean", "std")}
    save_file(tensors, folder / "model.safetensors")
    out = tmp_path / "checkpoint"
    assert main(["import-lerobot", str(folder), "--out", str(out), "--fps", "30"]) == 0
    assert (
        "action: no smallest and largest value in the statistics: the limits are mean +- 5 std"
        in capsys.readouterr().out
    )
    limits = [dim.high for dim in read_checkpoint(out, "policy").spec.robot.action]
    torch.testing.assert_close(torch.tensor(limits), stats["action"]["mean"] + 5 * stats["action"]["std"])
    images, state = raw(CAMERAS, FRAME, 5)
    noise = torch.randn(1, 6, 32)
    assert torch.equal(*(our_actions(path, images, state, f"{TASK}\n", noise) for path in (out, imported)))


def test_bfloat16_weights_choose_the_positions(theirs, tmp_path):
    folder = shutil.copytree(theirs, tmp_path / "half")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t.bfloat16() for k, t in tensors.items()}, folder / "model.safetensors")
    for extra, rule in (([], "bfloat16"), (["--positions", "float32_scaled"], "float32_scaled")):
        assert main(["import-lerobot", str(folder), "--out", str(tmp_path / "c"), "--fps", "5", *extra]) == 0
        policy, _ = load_policy(tmp_path / "c")
        assert policy.config.vision.positions == rule
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
