"""What `recap import-lerobot` and `export-lerobot` do not take is refused in words, with exit code 2."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lerobot_checkpoints import FRAME, TASK, assert_same, edit, our_actions, raw, their_actions
from recap_model.cli import main
from trained import SPEC


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
