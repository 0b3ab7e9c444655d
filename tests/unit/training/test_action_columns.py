"""Columns that say which actions are nothing to learn: masks of action groups, and padding."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edited_datasets import set_column, write_dataset
from model_factory import STATS, TOKENIZER, make_policy, make_table
from recap_model.cli import main
from recap_model.policy import flow
from recap_model.policy.fast_tokenizer import fit_fast
from training.action_groups import parse_groups, with_groups
from training.action_tokens import ActionTokens, normalized_chunks
from training.columns import DatasetError
from training.loader import Loader, Part
from training.policy_loss import policy_loss
from training.settings import ActionGroup
from training.table import load_table

TABLE = make_table()
ROWS = np.array([0, 3, 9, 20, 33])
LEFT, RIGHT = ActionGroup("left", 0, 2), ActionGroup("right", 2, 4)


def loader(table):
    return Loader(table, TOKENIZER, chunk=8, dropout=0.0, shift=0, seed=0)


def masked(left, right=None):
    columns = {"left": left, "right": np.ones(len(TABLE), bool) if right is None else right}
    return with_groups(replace(TABLE, loss_masks=columns), (LEFT, RIGHT))


def generator():
    return torch.Generator().manual_seed(3)


def test_masked_dimensions_give_no_gradient():
    policy, table = make_policy().train(), masked(np.zeros(len(TABLE), bool))
    policy_loss(policy, loader(table)(ROWS, 0), 2, generator()).backward()
    rows = policy.expert.action_out.weight.grad.abs().sum(1)
    assert (rows[:2] == 0).all() and (rows[2:] > 0).all()
    assert (policy.expert.action_out.bias.grad[:2] == 0).all()


def test_the_loss_is_the_sum_of_masked_squares_over_the_sum_of_the_mask():
    policy, mask = make_policy(), np.random.default_rng(0).random(len(TABLE)) < 0.5
    batch = loader(masked(mask, ~mask))(ROWS, 0)
    loss = policy_loss(policy, batch, 1, generator(), "fp32")
    draw = generator()
    actions = policy.normalize_actions(torch.from_numpy(batch.actions))
    noise = torch.randn(actions.shape, generator=draw)
    time = flow.sample_time(5, draw)
    noisy, target = flow.interpolate(actions, noise, time)
    arrays = map(torch.from_numpy, (batch.state, batch.tokens, batch.token_mask))
    prefix = policy.read(policy.see(torch.from_numpy(batch.images)).float(), *arrays)
    squares = ((policy.velocity(noisy, time, prefix) - target) ** 2).detach().numpy()
    total = weight = 0.0
    for b, row in enumerate(ROWS):
        for t in range(8):
            if row + t < TABLE.end[row]:  # masked by its own frame's flags
                m = np.array([mask[row + t]] * 2 + [not mask[row + t]] * 2, float)
                total, weight = total + (squares[b, t] * m).sum(), weight + m.sum()
    assert loss.item() == pytest.approx(total / max(weight, 1), rel=1e-4)


def test_all_ones_is_no_mask_and_all_zeros_no_loss():
    policy, ones, zeros = make_policy(), np.ones(len(TABLE), bool), np.zeros(len(TABLE), bool)
    plain = policy_loss(policy, loader(TABLE)(ROWS, 0), 2, generator())
    torch.testing.assert_close(policy_loss(policy, loader(masked(ones))(ROWS, 0), 2, generator()), plain)
    assert policy_loss(policy, loader(masked(zeros, zeros))(ROWS, 0), 2, generator()) == 0
    part = loader(masked(zeros, zeros))(ROWS, 0, part=Part(0, 2))
    assert part.valid_share() == 0


def test_chunks_with_a_masked_group_and_chunks_that_begin_in_padding_teach_no_action_tokens():
    chunks = np.concatenate(list(normalized_chunks(TABLE.action, TABLE.end, STATS["action"], 8)))
    tokens = ActionTokens(fit_fast(chunks, scale=4, vocabulary=64), 24, STATS["action"])
    left = np.ones(len(TABLE), bool)
    left[[4, 10]] = False  # rows 0 and 3 run over frame 4, row 9 over frame 10
    table = replace(masked(left), action_is_pad=np.arange(len(TABLE)) == 20)
    _, learned = tokens(loader(table)(ROWS, 0))
    assert learned.any(1).tolist() == [False, False, False, False, True]
    nothing, none = tokens(loader(table)(ROWS[:2], 0))
    assert nothing.shape == (2, 1) and not none.any()


def test_padding_is_not_learned_by_frame_and_by_step_of_the_chunk():
    frames = np.arange(len(TABLE)) % 5 == 4
    batch = loader(replace(TABLE, action_is_pad=frames))(ROWS, 0)
    steps = ROWS[:, None] + np.arange(8)
    inside = steps < TABLE.end[ROWS][:, None]
    np.testing.assert_array_equal(batch.valid, inside & (steps % 5 != 4))
    assert batch.total_valid == batch.valid.sum()
    chunks = np.random.default_rng(0).random((len(TABLE), 10)) < 0.3  # longer than the policy's chunk: its head counts
    batch = loader(replace(TABLE, action_is_pad=chunks))(ROWS, 0)
    np.testing.assert_array_equal(batch.valid, inside & ~chunks[ROWS][:, :8])
    with pytest.raises(ValueError, match="action_is_pad: expected at least 8 steps a frame, the chunk's length, got 5"):
        loader(replace(TABLE, action_is_pad=chunks[:, :5]))


def test_what_stands_in_padding_does_not_change_the_loss_of_the_rest():
    policy, pad = make_policy().train(), np.zeros(len(TABLE), bool)
    pad[[2, 3, 11]] = True
    action = TABLE.action.copy()
    batch = loader(replace(TABLE, action_is_pad=pad))(np.array([0]), 0)
    assert batch.valid[0].tolist() == [True, True, False, False, True, False, False, False]
    action[[2, 3]] = 1e6  # a target of that size would show, however little of it counted
    wild = loader(replace(TABLE, action=action, action_is_pad=pad))(np.array([0]), 0)
    assert policy_loss(policy, wild, 2, generator()) < 1e3 < policy_loss(
        policy, loader(replace(TABLE, action=action))(np.array([0]), 0), 2, generator()
    )  # fmt: skip


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "dataset")


def test_the_columns_are_read_from_a_dataset(dataset):
    frames = 22
    left = [float(i % 3 > 0) for i in range(frames)]
    set_column(dataset, "loss_mask_left", left)
    set_column(dataset, "action_is_pad", [[i % 4 == 3, False] for i in range(frames)])
    table = load_table(dataset).table
    assert table.loss_masks["left"].tolist() == [flag > 0 for flag in left]
    assert table.action_is_pad.shape == (22, 2) and table.action_is_pad[3].tolist() == [True, False]
    mask = with_groups(table, parse_groups(["left=1:2"])).action_mask
    assert mask[:, 0].all() and mask[:, 1].tolist() == table.loss_masks["left"].tolist()


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("loss_mask_left", [0.5] * 22, r"column 'loss_mask_left': expected 0 or 1, got 0\.5 in row 0"),
        ("action_is_pad", [[True]] * 21 + [[True, False]], r"expected chunks of one length, got the lengths \[1, 2\]"),
        ("action_is_pad", [2] * 22, r"column 'action_is_pad': expected 0 or 1, got 2"),
    ],
)
def test_columns_that_are_no_flags_are_refused(dataset, name, values, said):
    set_column(dataset, name, values)
    with pytest.raises(DatasetError, match=said):
        load_table(dataset)


def test_a_flag_a_frame_makes_padding_of_single_frames(dataset):
    set_column(dataset, "action_is_pad", [i == 3 for i in range(22)])
    assert np.flatnonzero(load_table(dataset).table.action_is_pad).tolist() == [3]


def test_groups_without_their_flag_are_mentioned_and_no_mask_is_made(capsys):
    table = replace(TABLE, loss_masks={"left": np.ones(len(TABLE), bool)})
    assert with_groups(table, ()) is table
    assert "the data has loss_mask_left, which nothing reads without --action-groups" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["left", "left=0", "left=2:2", "left=3:1", "=0:2", "left=a:b", "left=-1:2", "a b=0:1"])
def test_malformed_groups_are_refused(text):
    with pytest.raises(ValueError, match="--action-groups: expected NAME=START:STOP with START < STOP"):
        parse_groups([text])


def test_groups_are_distinct():
    assert parse_groups(["left=0:7", "right=7:14"]) == (ActionGroup("left", 0, 7), ActionGroup("right", 7, 14))
    for texts in (["left=0:3", "right=2:4"], ["left=0:1", "left=1:2"]):
        with pytest.raises(ValueError, match="expected groups with names and dimensions of their own"):
            parse_groups(texts)


def test_the_command_trains_with_groups_and_says_what_is_wrong_with_them(dataset, tmp_path, capsys):
    set_column(dataset, "loss_mask_left", [1.0] * 22)
    command = ["train", "policy", "--dataset", str(dataset), "--mode", "imitation", "--preset", "debug", "--steps", "2"]
    command += ["--out", str(tmp_path / "x")]
    for groups, said in (
        ("right=0:1", "expected a column loss_mask_right"),
        ("left=1:3", "--action-groups left=1:3: expected dimensions of an action of 2, got 2"),
    ):
        assert main([*command, "--action-groups", groups]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--action-groups", "left=0:1"]) == 0
