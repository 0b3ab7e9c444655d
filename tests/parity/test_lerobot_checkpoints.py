"""Checkpoints across the border: LeRobot's folders in, ours out, and the same physical actions on both sides."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import NormalizationMode
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from safetensors.torch import load_file, save_file

from lerobot_smolvla import lerobot_policy, write_vlm
from recap_model import conditioning, observation
from recap_model.checkpoint import read_checkpoint
from recap_model.cli import main
from recap_model.manifest import verify
from recap_model.policy.load import load_policy
from recap_model.policy.sizes import smolvla_base
from trained import SPEC, make_data
from training import presets
from training.lerobot_export import lerobot_weights
from training.loop import autocast_vision

TASK = "open the drawer"
CAMERAS, FRAME = ("c0", "c1"), (48, 64)


def statistics(seed: int = 5) -> dict[str, dict[str, torch.Tensor]]:
    g, out = torch.Generator().manual_seed(seed), {}
    for key, width in (("observation.state", 5), ("action", 4)):
        mean, std = torch.randn(width, generator=g), torch.rand(width, generator=g) + 0.2
        low, high = mean - 3 * std, mean + 2.5 * std
        out[key] = {"mean": mean, "std": std, "min": low, "max": high, "q01": low * 0.9, "q99": high * 0.8}
    return out


def save(policy: SmolVLAPolicy, folder: Path, stats: dict[str, dict[str, torch.Tensor]]) -> Path:
    """As LeRobot's training writes a checkpoint."""
    policy.save_pretrained(folder)
    for pipeline in make_smolvla_pre_post_processors(policy.config, stats):
        pipeline.save_pretrained(folder)
    return folder


def open_theirs(folder: Path):
    """(policy, preprocessor, postprocessor) as LeRobot opens them."""
    policy = SmolVLAPolicy.from_pretrained(folder, strict=True)
    pre = PolicyProcessorPipeline.from_pretrained(folder, config_filename="policy_preprocessor.json")
    post = PolicyProcessorPipeline.from_pretrained(
        folder,
        config_filename="policy_postprocessor.json",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return policy, pre, post


def raw(cameras, frame, state_dim, seed=0):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (*frame, 3), np.uint8) for name in cameras}
    return images, rng.normal(size=state_dim).astype(np.float32)


def their_actions(folder, images, state, task, noise):
    policy, pre, post = open_theirs(folder)
    batch = {f"observation.images.{k}": torch.from_numpy(v).permute(2, 0, 1) / 255 for k, v in images.items()}
    batch |= {"observation.state": torch.from_numpy(state), "task": task}
    return post(policy.predict_action_chunk(pre(batch), noise=noise))[0]


def our_actions(folder, images, state, prompt, noise):
    policy, files = load_policy(folder)
    x = observation.prepare(images, state, prompt, files.spec.robot, files.tokenizer)
    arrays = (x.images, x.state, x.tokens, x.token_mask)
    with torch.no_grad():
        return policy.sample_actions(*(torch.from_numpy(a)[None] for a in arrays), noise)[0]


def assert_same(ours, theirs):
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def assert_same_checkpoint(first: Path, second: Path, *, tokenizer: bool = True) -> None:
    for name in ("config.json", "norm_stats.json", "spec.json") + (("tokenizer.json",) if tokenizer else ()):
        assert json.loads((first / name).read_text()) == json.loads((second / name).read_text()), name
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A LeRobot checkpoint with statistics. Only read it."""
    root = tmp_path_factory.mktemp("theirs")
    return save(lerobot_policy(write_vlm(root / "vlm"), frame=FRAME), root / "policy", statistics())


@pytest.fixture(scope="module")
def imported(theirs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "checkpoint"
    tasks = ["--task", TASK, "--task", "close it"]
    assert main(["import-lerobot", str(theirs), "--out", str(out), "--fps", "30", *tasks]) == 0
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


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


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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


def drop_and_add(folder: Path) -> None:
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    tensors.pop("model.state_proj.bias")
    save_file({**tensors, "model.value_head.weight": torch.zeros(2)}, folder / "model.safetensors")


def class_step(folder: Path) -> None:
    path = folder / "policy_preprocessor.json"
    data = json.loads(path.read_text())
    data["steps"].insert(0, {"class": "evil.module.Step", "config": {}})
    path.write_text(json.dumps(data))


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.zeros(3)}, folder / "model.safetensors")


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_statistics(folder: Path) -> None:
    for path in folder.glob("policy_p*.safetensors"):
        save_file({"so100.action.mean": torch.zeros(4)}, path)


def outside(folder: Path) -> None:
    path = folder / "policy_preprocessor.json"
    path.write_text(path.read_text().replace("policy_preprocessor_step_5", "../policy_preprocessor_step_5"))


BAD = {
    "another policy": (lambda f: edit(f / "config.json", type="pi05"), "type: expected one of ['smolvla'], got 'pi05'"),
    "aloha": (lambda f: edit(f / "config.json", adapt_to_pi_aloha=True), "'adapt_to_pi_aloha': True"),
    "keys": (drop_and_add, "1 missing: state_in.bias; 1 unknown: model.value_head.weight"),
    "a pickle": (to_pickle, "got a pickle: pickles are never opened"),
    "only a pickle": (only_pickle, "got only pytorch_model.bin: pickles are never opened"),
    "a class": (class_step, "got the class 'evil.module.Step': code of a checkpoint is never imported"),
    "no statistics": (no_statistics, "expected the statistics ['mean', 'std'] of its normalisation 'mean_std', got []"),
    "half": (lambda f: (f / "policy_postprocessor.json").unlink(), "got none of ['unnormalizer_processor']"),
    "a path": (outside, "state_file: expected the name of a file in this folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "expected a folder with config.json, got none"),
    "fewer layers": (lambda f: edit(f / "config.json", num_vlm_layers=8), " unknown: expert.layers.10."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_words(theirs, tmp_path, capsys, name):
    folder = shutil.copytree(theirs, tmp_path / "policy")
    spoil, words = BAD[name]
    spoil(folder)
    assert main(["import-lerobot", str(folder), "--out", str(tmp_path / "out"), "--fps", "30"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("recap import-lerobot: ") and words in said and "Traceback" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy"]


def test_bad_arguments_are_refused_in_words(theirs, imported, data, tmp_path, capsys):
    wrong = tmp_path / "robot.json"
    wrong.write_text(json.dumps(SPEC.to_json()))
    out = ["--out", str(tmp_path / "out")]
    cases = {
        "state: expected 5 (the policy's), got 2 (the robot's)": [str(theirs), "--spec", str(wrong)],
        "cameras: expected ['c0', 'c1'] (the policy's), got ['front', 'top']": [str(theirs), "--spec", str(wrong)],
        "--fps: expected the robot's control rate in Hz, got none": [str(theirs)],
        "--cameras: expected names among ['c0', 'c1'], got ['c7']": [str(theirs), "--fps", "3", "--cameras", "c7"],
        "expected one description of the robot, got both": [str(theirs), "--spec", str(wrong), "--dataset", str(data)],
        "SOURCE: expected a folder, or a hub repository that can be reached, got 'lerobot/smolvla_base'": [
            "lerobot/smolvla_base"
        ],
        "SOURCE: expected a folder or a hub name": ["/nowhere/at/all"],
        "--vlm: expected a folder, or a hub repository that can be reached, got 'a/b'": [
            str(theirs), "--fps", "3", "--vlm", "a/b"
        ],
    }  # fmt: skip
    for words, arguments in cases.items():
        assert main(["import-lerobot", *arguments, *out]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["export-lerobot", str(imported), "--out", str(data)]) == 2
    assert "expected a new folder or an earlier export" in capsys.readouterr().err


def test_a_robot_with_fewer_cameras(theirs, tmp_path):
    out = tmp_path / "one"
    assert main(["import-lerobot", str(theirs), "--out", str(out), "--fps", "30", "--cameras", "c1=wrist"]) == 0
    images, state = raw(("c1",), FRAME, 5)
    noise = torch.randn(1, 6, 32)
    want = their_actions(theirs, images, state, TASK, noise)
    assert_same(our_actions(out, {"wrist": images["c1"]}, state, f"{TASK}\n", noise), want)


def test_another_layout_is_not_exported(data, tmp_path, capsys):
    out = tmp_path / "policy"
    command = ["train", "policy", "--dataset", str(data / "dataset"), "--out", str(out), "--mode", "imitation"]
    assert main([*command, "--preset", "debug", "--steps", "1"]) == 0
    assert main(["export-lerobot", str(out), "--out", str(tmp_path / "folder")]) == 2
    assert "Train from a preset `smolvla_*`" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
