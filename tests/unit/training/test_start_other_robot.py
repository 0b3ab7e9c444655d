"""Starting a new robot from a padded checkpoint: which robots it takes, and that nothing but the robot changes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_factory import ROBOT, SMOLVLA, STATS, TOKENIZER, save_policy
from recap_client.spec import ActionDim, Camera, RobotSpec, SpecError, StateDim
from recap_model.cli import main
from recap_model.manifest import publish, read_manifest, write_manifest
from recap_model.normalize import NormStats
from recap_model.policy.load import load_policy
from recap_model.policy.model import Policy
from recap_model.spec import PolicySpec
from training import presets
from training.checkpoint import write_checkpoint
from training.start import config_for, start, with_weights
from training.table import load_table
from two_robots import CART, make_dataset


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """The layout of smolvla_base in small, for `model_factory.ROBOT`: 3 of 8 state and 4 of 6 action dimensions."""
    torch.manual_seed(0)
    policy = Policy(SMOLVLA, STATS)
    out = tmp_path_factory.mktemp("pretrained") / "policy"
    with publish(out) as folder:
        spec = PolicySpec(ROBOT, 8, 16)
        write_checkpoint(folder, policy.state_dict(), SMOLVLA.to_json(), spec, TOKENIZER, STATS)
        write_manifest(folder, "policy", parameters={"vlm_name": "some/vlm"})
    return out


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("cart"), CART)


def robot(state: int, action: int, cameras: int = 1, side: tuple[int, int] = (64, 64)) -> RobotSpec:
    return RobotSpec(
        "any",
        tuple(Camera(f"c{i}", *side) for i in range(cameras)),
        tuple(StateDim(f"s{i}", "m") for i in range(state)),
        tuple(ActionDim(f"a{i}", "m", -1.0, 1.0) for i in range(action)),
        5.0,
    )


def command(dataset: Path, init: Path, out: Path) -> list[str]:
    base = ["train", "policy", "--preset", "smolvla_debug", "--steps", "2", "--batch-size", "4", "--mode", "imitation"]
    return [*base, "--dataset", str(dataset), "--init", str(init), "--out", str(out)]


def refused(capsys, argv: list[str]) -> str:
    assert main(argv) == 2
    return " ".join(capsys.readouterr().err.split())


def test_another_robot_is_refused_and_the_flag_is_named(pretrained, dataset, tmp_path, capsys):
    said = refused(capsys, command(dataset, pretrained, tmp_path / "x"))
    assert f"dataset against {pretrained}: spec.cameras differs: expected" in said
    assert "to start this robot from those weights, with statistics of its own data, add --new-robot" in said
    assert not (tmp_path / "x").exists()


def test_a_robot_that_does_not_fit_is_not_sent_to_the_flag(dataset, tmp_path, capsys):
    narrow = save_policy(tmp_path / "conv")  # 64 px: its tower has learned positions for that size
    said = refused(capsys, command(dataset, narrow, tmp_path / "x"))
    assert "spec.cameras differs" in said and "--new-robot" not in said
    said = refused(capsys, [*command(dataset, narrow, tmp_path / "x"), "--new-robot"])
    assert f"{narrow}: expected cameras of 64x64 px" in said and "got 32x32; resize the frames" in said


def test_the_flag_needs_a_checkpoint(dataset, tmp_path, capsys):
    argv = ["train", "policy", "--dataset", str(dataset), "--out", str(tmp_path / "x"), "--new-robot"]
    assert "--new-robot: expected --init with the checkpoint to start from, got none" in refused(capsys, argv)


def test_the_flag_gives_the_checkpoint_the_robot_of_the_data(pretrained, dataset, tmp_path):
    out = tmp_path / "cart"
    assert main([*command(dataset, pretrained, out), "--new-robot"]) == 0
    policy, files = load_policy(out)
    source = load_table(dataset)
    assert files.spec.robot == replace(CART, tasks=("the door",)) == source.robot
    assert (policy.config.state_dim, policy.config.action_dim, policy.config.cameras) == (2, 1, 1)
    assert (policy.config.state_width, policy.config.action_width) == (8, 6)
    assert files.spec.chunk == SMOLVLA.chunk and files.stats.keys() == {"state", "action"}
    np.testing.assert_array_equal(files.stats["state"].mean, NormStats.of(source.table.state).mean)
    np.testing.assert_array_equal(files.stats["action"].q99, NormStats.of(source.table.action).q99)
    manifest = read_manifest(out)
    assert manifest.parents == {"dataset": source.hash, "init": read_manifest(pretrained).hash}
    assert manifest.parameters["new_robot"] is True and manifest.parameters["vlm_name"] == "some/vlm"
    ids, mask = TOKENIZER("the door\nAdvantage: positive\n")
    actions = policy.sample_actions(
        torch.from_numpy(source.table.images[:1]), torch.from_numpy(source.table.state[:1]),
        torch.from_numpy(ids)[None], torch.from_numpy(mask)[None], torch.zeros(1, 8, 6),
    )  # fmt: skip
    assert actions.shape == (1, 8, 1) and bool(actions.isfinite().all())
    assert main([*command(dataset, out, tmp_path / "more")]) == 0  # it is the cart's own from now on


def test_training_starts_from_the_very_weights(pretrained, dataset):
    options = replace(presets.load("smolvla_debug").policy(), new_robot=True)
    policy, files = start(options, load_table(dataset), pretrained)
    before = load_policy(pretrained)[0].state_dict()
    assert policy.training and files.config == policy.config.to_json()
    assert before.keys() == policy.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_words_that_it_cannot_read_are_refused(pretrained, tmp_path, capsys):
    data = make_dataset(tmp_path / "data", replace(CART, tasks=("fold the towel",)), (5,))
    said = refused(capsys, [*command(data, pretrained, tmp_path / "x"), "--new-robot"])
    assert "got ['fold the towel'] with the new words ['fold', 'towel']; train from scratch" in said
    data = make_dataset(tmp_path / "known", CART, (5,))
    said = refused(capsys, [*command(data, pretrained, tmp_path / "x"), "--new-robot", "--names-in-prompt"])
    assert "with the new words [',', 'Action', 'State', 'force', 'speed', 'x']" in said


@settings(max_examples=12)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_every_robot_that_the_padding_holds_leaves_the_weights_their_shapes(state, action, cameras, special):
    config = replace(SMOLVLA, image_tokens=(2, 3) if special else None)
    given_one = robot(state, action, cameras, (48, 64))
    made = config_for(config, given_one, Path("c"))
    assert (made.state_dim, made.action_dim, made.cameras, made.frame) == (state, action, cameras, (48, 64))
    assert (made.padded_state, made.padded_action) == (8, 6)
    assert made.empty_cameras == (max(2 - cameras, 0) if special else 0)
    assert config_for(made, given_one, Path("c")) == made
    ones = {"state": NormStats.of(np.eye(8)[:, :state]), "action": NormStats.of(np.eye(8)[:, :action])}
    with_weights(Policy(SMOLVLA, STATS), made, ones)  # strict: another name or shape would raise


def test_a_robot_that_needs_more_dimensions_is_refused():
    text = r"^c: expected a robot of at most 8 state and 6 action dimensions \(what .* pads its vectors to\), got {}; "
    with pytest.raises(SpecError, match=text.format("9 and 6")):
        config_for(SMOLVLA, robot(9, 6), Path("c"))
    with pytest.raises(SpecError, match=text.format("8 and 7")):
        config_for(SMOLVLA, robot(8, 7), Path("c"))
    unpadded = replace(SMOLVLA, state_width=None, action_width=None)
    assert config_for(unpadded, robot(2, 4), Path("c")).state_width == 3
    with pytest.raises(SpecError, match="at most 3 state and 4 action dimensions"):
        config_for(unpadded, robot(4, 4), Path("c"))


def test_the_network_sees_the_same_whatever_the_units_of_the_robot():
    """A robot whose numbers are those of another in other units gets the same actions, in its own units."""
    torch.manual_seed(0)
    policy = Policy(SMOLVLA, STATS).eval()
    gain = {"state": np.array([100.0, 10.0, 1000.0]), "action": np.array([100.0, 1.0, 10.0, 1000.0])}
    rng = np.random.default_rng(0)
    data = {"state": rng.normal(2.0, 3.0, (50, 3)), "action": rng.normal(0.2, 0.5, (50, 4))}
    metres = with_weights(policy, SMOLVLA, {k: NormStats.of(v) for k, v in data.items()})
    scaled = with_weights(policy, SMOLVLA, {k: NormStats.of(v * gain[k]) for k, v in data.items()})
    ids, mask = (torch.from_numpy(x)[None] for x in TOKENIZER("open the door\nAdvantage: positive\n"))
    images = torch.from_numpy(rng.integers(0, 256, (1, 2, 64, 64, 3), np.uint8))
    state, noise = torch.from_numpy(data["state"][:1]).float(), torch.randn(1, 8, 6)
    with torch.no_grad():
        ours = metres.sample_actions(images, state, ids, mask, noise)
        theirs = scaled.sample_actions(images, state * torch.from_numpy(gain["state"]).float(), ids, mask, noise)
    torch.testing.assert_close(ours * torch.from_numpy(gain["action"]).float(), theirs, rtol=1e-4, atol=1e-4)
