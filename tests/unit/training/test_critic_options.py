"""The options of `recap train critic`: each does what its help says, and old checkpoints still load."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from model_factory import STATS, TOKENIZER, make_critic, make_table, save_critic
from recap_model import cli
from recap_model.critic.config import CriticConfig
from recap_model.critic.freeze import freeze
from recap_model.critic.load import load_critic
from recap_model.critic.model import Critic
from recap_model.manifest import read_manifest, write_manifest
from recap_model.policy.config import SiglipConfig
from trained import make_data
from training.critic_loss import critic_loss, disturb_state, frame_weights
from training.loader import Loader, Part
from training.presets import debug

QUIET = replace(debug.critic(), state_noise=0.0)
CRITIC = make_critic()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_of(rows):
    loader = Loader(make_table(), TOKENIZER, chunk=1, dropout=0.0, shift=0, seed=0)
    return loader(np.asarray(rows), 0, train=False)


class TestState:
    @given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 99))
    @settings(max_examples=40)
    def test_dropout_replaces_whole_samples_by_the_mean_and_leaves_the_others(self, batch, share, seed):
        state = torch.randn((batch, 3), generator=seeded(seed))
        got = disturb_state(CRITIC, state, replace(QUIET, state_dropout=share), seeded(seed))
        mean, same = (got == CRITIC.state_shift).all(1), (got == state).all(1)
        assert (mean ^ same).all()
        assert (mean.all() if share == 1 else True) and (same.all() if share == 0 else True)

    def test_dropout_is_drawn_per_sample(self):
        state = torch.randn((4000, 3), generator=seeded())
        got = disturb_state(CRITIC, state, replace(QUIET, state_dropout=0.2), seeded())
        assert (got == CRITIC.state_shift).all(1).float().mean() == pytest.approx(0.2, abs=0.03)

    def test_dropout_changes_nothing_about_the_noise_of_the_samples_it_keeps(self):
        state, noisy = torch.zeros(50, 3), replace(QUIET, state_noise=0.5)
        plain = disturb_state(CRITIC, state, noisy, seeded())
        some = disturb_state(CRITIC, state, replace(noisy, state_dropout=0.5), seeded())
        kept = (some != CRITIC.state_shift).any(1)
        assert 0 < kept.sum() < 50 and torch.equal(plain[kept], some[kept])

    def test_a_dropped_state_reads_as_zeros(self):
        rows = batch_of([0, 9])
        mean = np.broadcast_to(STATS["state"].mean.astype(np.float32), rows.state.shape).copy()
        one = critic_loss(CRITIC, rows, replace(QUIET, state_dropout=1.0), seeded())
        assert one.item() == pytest.approx(critic_loss(CRITIC, replace(rows, state=mean), QUIET, seeded()).item())

    def test_a_critic_without_state_never_looks_at_it(self):
        blind = Critic(replace(CRITIC.config, use_state=False), STATS).eval()
        rows = batch_of([0, 9])
        images, tokens, mask = (torch.from_numpy(a) for a in (rows.images, rows.tokens, rows.token_mask))
        with torch.no_grad():
            first, _ = blind(images, torch.zeros(2, 3), tokens, mask)
            second, _ = blind(images, torch.full((2, 3), 1e6), tokens, mask)
            other, _ = blind(images.flip(0), torch.zeros(2, 3), tokens, mask)
        assert torch.equal(first, second) and not torch.equal(first, other)
        assert not [name for name, _ in blind.named_parameters() if name.startswith("state")]


class TestLoss:
    @given(st.lists(st.integers(0, 46), min_size=1, max_size=6), st.integers(2, 4))
    @settings(max_examples=15)
    def test_a_weight_of_k_counts_as_k_copies_of_the_frame(self, rows, weight):
        weighted = replace(QUIET, end_weight=float(weight), end_threshold=-0.3)
        near = make_table().target[rows] > -0.3
        copies = np.repeat(rows, np.where(near, weight, 1))
        with torch.no_grad():
            expected = critic_loss(CRITIC, batch_of(copies), QUIET, seeded())
            assert critic_loss(CRITIC, batch_of(rows), weighted, seeded()).item() == pytest.approx(
                expected.item(), 1e-3
            )

    @given(st.integers(4, 20), st.integers(1, 4), st.floats(1, 5))
    @settings(max_examples=15)
    def test_micro_batches_add_up_to_the_step(self, size, count, weight):
        loader = Loader(make_table(), TOKENIZER, chunk=1, dropout=0.0, shift=0, seed=0)
        chosen = replace(debug.critic(), end_weight=weight, end_threshold=-0.3, state_dropout=0.3)
        rows = np.arange(size) * 2
        with torch.no_grad():
            whole = critic_loss(CRITIC, loader(rows, 0), chosen, seeded())
            parts = [critic_loss(CRITIC, loader(rows, 0, part=Part(i, count)), chosen, seeded()) for i in range(count)]
        assert sum(part.item() for part in parts) == pytest.approx(whole.item(), 1e-3)

    def test_the_threshold_itself_is_not_near_the_end(self):
        weights = frame_weights(np.array([-1, -0.1, -0.05, 0], np.float32), replace(QUIET, end_weight=3.0))
        assert weights.tolist() == [1, 1, 3, 3] and weights.dtype == np.float32

    def test_targets_are_learned_either_way_but_differ(self):
        losses = {name: critic_loss(CRITIC, batch_of([20, 30]), replace(QUIET, target=name), seeded()).item()
                  for name in ("two_hot", "hl_gauss")}  # fmt: skip
        assert losses["two_hot"] != losses["hl_gauss"]

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("state_dropout", 1.5, r"state_dropout: expected a share in \[0, 1\], got 1.5"),
            ("end_weight", 0.0, "end_weight: expected a positive weight, got 0.0"),
            ("end_threshold", 0.2, r"end_threshold: expected a return in \[-1, 0\], got 0.2"),
        ],
    )
    def test_numbers_without_a_meaning_are_refused(self, field, value, said):
        with pytest.raises(ValueError, match=said):
            replace(QUIET, **{field: value})

    def test_dropping_a_state_that_is_not_there_is_refused(self):
        with pytest.raises(ValueError, match=r"expected 0 for a critic without state, got 0\.2"):
            replace(QUIET, use_state=False, state_dropout=0.2)


class TestFreeze:
    SIGLIP = SiglipConfig(image_size=64, width=32, layers=2, heads=2, intermediate=64, shuffle=2)

    @pytest.mark.parametrize("vision", [CRITIC.config.vision, SIGLIP])
    def test_what_trains(self, vision):
        critic = Critic(replace(CRITIC.config, vision=vision, frame=(64, 64)), STATS)
        every = {name for name, _ in critic.named_parameters()}
        tower = {name for name in every if name.startswith("vision.")}
        projection = {n for n in tower if n.split(".")[1] in ("project", "connector") or n == "vision.position"}
        projection -= {"vision.position"} if isinstance(vision, SiglipConfig) else set()
        text = {name for name in every if name.startswith("language.")}
        assert projection and text and len(tower) > len(projection)
        for mode, trains in (
            ("vision", every - tower | projection),
            ("all", every - tower - text | projection),
            ("none", every),
        ):
            freeze(critic, mode)
            assert {name for name, p in critic.named_parameters() if p.requires_grad} == trains


def test_a_checkpoint_from_before_these_options_loads(tmp_path):
    folder = save_critic(tmp_path / "critic")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("use_state") is True
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder, "critic")
    critic, _ = load_critic(folder)
    assert critic.config == CriticConfig.from_json(json.loads(json.dumps(make_critic().config.to_json())))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """dataset/, returns/ and first/: a critic trained for two steps with every option."""
    root = make_data(tmp_path_factory.mktemp("options"))
    options = ["--target", "two_hot", "--state-dropout", "0.3", "--end-weight", "3", "--end-threshold", "-0.2"]
    assert train(root, "first", *options, "--ema", "0.5", steps=2) == 0
    return root


def train(root, name, *options, steps=1):
    command = ["train", "critic", "--dataset", str(root / "dataset"), "--returns", str(root / "returns")]
    command += ["--preset", "debug", "--steps", str(steps), "--out", str(root / name)]
    return cli.main([*command, "--values-out", str(root / f"{name}-values"), *options])


def weights(root, name):
    return load_file(root / name / "model.safetensors")


def test_the_manifest_says_what_was_chosen(run):
    chosen = read_manifest(run / "first").parameters
    expected = {"target": "two_hot", "state_dropout": 0.3, "end_weight": 3.0, "end_threshold": -0.2, "freeze": "none",
                "use_state": True}  # fmt: skip
    assert {name: chosen[name] for name in expected} == expected and chosen["fit"]["optim"]["ema"] == 0.5
    assert read_manifest(run / "first").metrics["warnings"] == []
    page = (run / "first" / "report.html").read_text()
    assert "Critic first" in page and "held out from training" in page and "data:image/svg+xml" in page


def test_ema_is_the_decay_of_the_published_average(run):
    """After one step the average is d * start + (1 - d) * weights, with d = min(ema, 1 / 10) while it warms up."""
    init = ["--init", str(run / "first"), "--lr", "0.01"]
    assert train(run, "last", *init, "--ema", "0") == train(run, "mean", *init, "--ema", "0.9") == 0
    start, last, mean = (weights(run, name) for name in ("first", "last", "mean"))
    assert not np.array_equal(start["head.weight"], last["head.weight"])
    for name, value in mean.items():
        np.testing.assert_allclose(value, 0.1 * start[name] + 0.9 * last[name], atol=1e-6, err_msg=name)


def test_a_frozen_warm_start_keeps_the_weights_in_every_fold_and_warns_that_folds_leak(run, capsys):
    assert train(run, "frozen", "--init", str(run / "first"), "--freeze", "all", "--folds", "2") == 0
    said = capsys.readouterr().out
    assert f"warning: --init {run / 'first'} has trained on this very dataset" in said
    assert "it has seen what each of the 2 folds holds out" in said
    before, after = weights(run, "first"), weights(run, "frozen")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {"head.weight", "readout", "state_in.weight", "vision.project.weight"} <= changed
    assert not [n for n in changed if n.startswith(("language.", "vision.convs", "vision.norms"))]
    command = ["label", "--dataset", str(run / "dataset"), "--returns", str(run / "returns"), "--n", "4"]
    assert cli.main([*command, "--values", str(run / "frozen-values"), "--out", str(run / "advantage")]) == 0
    audit = json.loads((run / "advantage" / "audit.json").read_text())
    assert any("has trained on this very dataset" in text for text in audit["warnings"])


def test_a_start_from_other_data_is_warned_about_in_other_words(run, tmp_path):
    other = shutil.copytree(run / "first", tmp_path / "other")
    write_manifest(other, "critic", parents={"dataset": "d" * 64})
    assert train(run, "moved", "--init", str(other)) == 0
    (text,) = read_manifest(run / "moved").metrics["warnings"]
    assert "has trained on other data: where that shares episodes" in text and "the validation report holds out" in text


def test_no_state_trains_publishes_and_predicts_without_it(run, capsys):
    assert train(run, "blind", "--no-state") == 0
    assert not [name for name in weights(run, "blind") if name.startswith("state")]
    assert load_critic(run / "blind")[0].config.use_state is False
    assert train(run, "x", "--init", str(run / "blind")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "expected a critic with state, got one without state (--no-state); a start keeps its inputs" in said


@pytest.mark.slow
def test_a_critic_without_state_is_exported_with_the_same_inputs(tmp_path):
    from onnxruntime import InferenceSession

    from exporters.onnx import export_onnx
    from exporters.wrap import load_graphs

    folder = save_critic(tmp_path / "critic")
    blind = Critic(replace(CRITIC.config, use_state=False), STATS).eval()
    from safetensors.torch import save_file

    save_file({name: p.detach().contiguous() for name, p in blind.named_parameters()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(blind.config.to_json()))
    write_manifest(folder, "critic")
    (graph,) = load_graphs(folder, guided=False)
    export_onnx(graph, tmp_path / "critic.onnx")
    session = InferenceSession(tmp_path / "critic.onnx")
    example = graph.example(2, 0)
    assert [item.name for item in session.get_inputs()] == list(graph.inputs)
    np.testing.assert_allclose(session.run(["value"], example)[0], graph.run(example)["value"], atol=1e-5)


def test_freezing_random_weights_and_a_decay_of_one_are_refused(run, capsys):
    assert train(run, "x", "--freeze", "vision") == 2
    assert "--freeze vision: expected --init CHECKPOINT" in " ".join(capsys.readouterr().err.split())
    assert train(run, "x", "--ema", "1") == 2
    assert "--ema: expected a decay in [0, 1), got 1.0" in capsys.readouterr().err
    assert not (run / "x").exists()
