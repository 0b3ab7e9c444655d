"""Offline action error: figures follow their definitions, padding counts nowhere, a prompt's effect is its own."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model_factory
from recap_model import cli
from recap_model.advantage import LabelRules
from recap_model.manifest import ManifestError, read_manifest, write_manifest
from sample_rollouts import make_dataset, record
from training.dataset import open_dataset
from training.ingest import ingest, survey
from training.labels import load_labels, make_labels, make_returns, write_values
from training.offline import ALL, OfflineSettings, choose_rows, effects, errors, offline_error, split_errors
from training.offline_report import build_page, to_json
from training.table import load_table

QUICK = OfflineSettings(frames=12, noise_seeds=(0, 1), batch_size=5, device="cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """dataset/, advantage/, policy/ and critic/ of one robot."""
    folder = tmp_path_factory.mktemp("offline")
    for number in range(4):
        record(folder / "rollouts", number, length=5 + 2 * number, success=number != 1,
               task=model_factory.TASKS[number % 2], demonstration=number == 0, spec=model_factory.ROBOT)  # fmt: skip
    ingest(survey([folder / "rollouts"]), folder / "dataset")
    data = open_dataset(folder / "dataset")
    make_returns(data, folder / "returns", all_successful=False)
    write_values(folder / "values", *data.keys(), np.random.default_rng(0).uniform(-1, 0, data.frames),
                 np.zeros(data.frames), dataset_hash=data.hash, critic_hash="c")  # fmt: skip
    make_labels(data, folder / "returns", folder / "values", folder / "advantage", LabelRules(n=3))
    model_factory.save_policy(folder / "policy")
    model_factory.save_critic(folder / "critic")
    return folder


def run(root, settings=QUICK, labels=True, policy="policy"):
    return offline_error(root / policy, root / "dataset", root / "advantage" if labels else None, settings)


def arrays(seed, frames=9, chunk=4, dims=3, seeds=2):
    """real [N, T, A], valid [N, T], labels [N] and a prediction [seeds, N, T, A]."""
    rng = np.random.default_rng(seed)
    valid = np.arange(chunk) < rng.integers(1, chunk + 1, frames)[:, None]
    return (rng.normal(size=(frames, chunk, dims)), valid, rng.integers(-1, 2, frames).astype(np.int8),
            rng.normal(size=(seeds, frames, chunk, dims)))  # fmt: skip


STD = np.array([0.5, 1.0, 2.0])


class TestFigures:
    def test_an_exact_prediction_and_the_mean(self):
        real = arrays(0)[0][:, 0]
        exact = errors(real[None], real, STD)
        assert (exact.mae == 0).all() and (exact.mse == 0).all() and (exact.r2 == 1).all()
        mean = errors(np.broadcast_to(real.mean(0), (1, *real.shape)), real, STD)
        np.testing.assert_allclose(mean.r2, 0, atol=1e-12)
        np.testing.assert_allclose(mean.mse, real.var(0))

    def test_a_dimension_without_spread_has_no_r2(self):
        real = arrays(0)[0][:, 0].astype(np.float32)
        real[:, 1] = np.float32(0.1)
        found = errors(real[None] + 0.5, real, np.array([1.0, 0.0, 1.0]))
        assert np.isnan(found.r2[1]) and np.isfinite(found.r2[[0, 2]]).all()
        assert np.isnan(found.relative_mae[1]) and np.isnan(found.relative_mse[1])

    @given(st.integers(0, 1000), st.floats(0.01, 100))
    def test_r2_and_relative_errors_know_no_units(self, seed, factor):
        real, _, _, predicted = arrays(seed)
        one = errors(predicted[:, :, 0], real[:, 0], STD)
        other = errors(predicted[:, :, 0] * factor, real[:, 0] * factor, STD * factor)
        for name in ("r2", "relative_mae", "relative_mse"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-9)
        np.testing.assert_allclose(one.mae * factor, other.mae, rtol=1e-9)
        assert (one.mse >= one.mae**2 - 1e-12).all()

    @given(st.integers(0, 1000))
    def test_labels_split_all_frames_without_loss(self, seed):
        real, valid, labels, predicted = arrays(seed)
        found = split_errors({"positive": predicted}, real, valid, labels, STD)
        for horizon in ("first", "chunk"):
            whole = found["positive", ALL, horizon]
            parts = [value for key, value in found.items() if key[1] != ALL and key[2] == horizon]
            assert sum(part.count for part in parts) == whole.count
            for name in ("mae", "mse"):
                total = sum(part.count * getattr(part, name) for part in parts) / whole.count
                np.testing.assert_allclose(total, getattr(whole, name))
        assert found["positive", ALL, "first"].count == len(real)
        assert found["positive", ALL, "chunk"].count == valid.sum()

    @settings(max_examples=20)
    @given(st.integers(0, 1000))
    def test_padding_counts_nowhere(self, seed):
        real, valid, labels, predicted = arrays(seed)
        other = predicted[::-1]
        spoilt = [np.where(valid[..., None], values, 1e6) for values in (real, predicted, other)]
        clean = split_errors({"positive": predicted}, real, valid, labels, STD)
        dirty = split_errors({"positive": spoilt[1]}, spoilt[0], valid, labels, STD)
        for key in clean:
            np.testing.assert_array_equal(clean[key].mse, dirty[key].mse)
        pair = effects({"a": predicted, "b": other}, valid, STD)
        assert pair.keys() == {"a against b", "noise"}
        again = effects({"a": spoilt[1], "b": spoilt[2]}, valid, STD)
        assert all((pair[key].per_dimension == again[key].per_dimension).all() for key in pair)

    def test_nothing_but_padding_is_refused(self):
        real, valid, labels, predicted = arrays(0)
        with pytest.raises(ValueError, match="expected frames with an action, got 9 frames of padding"):
            split_errors({"none": predicted}, real, np.zeros_like(valid), labels, STD)

    def test_an_effect_is_the_difference_in_standard_deviations(self):
        _, valid, _, predicted = arrays(0)
        shift = np.array([0.5, -1.0, 0.0])
        found = effects({"positive": predicted, "negative": predicted + shift}, valid, STD)
        np.testing.assert_allclose(found["positive against negative"].per_dimension, [1.0, 1.0, 0.0], atol=1e-12)
        alone = effects({"positive": predicted[:1], "none": predicted[:1]}, valid, STD)
        assert alone.keys() == {"positive against none"} and alone["positive against none"].mean == 0


class TestPolicy:
    def test_the_same_run_gives_the_same_report_whatever_the_batches(self, root):
        one, other = run(root), run(root, replace(QUICK, batch_size=3))
        assert to_json(run(root)) == to_json(one)
        for key, found in one.errors.items():
            np.testing.assert_allclose(found.mae, other.errors[key].mae, rtol=1e-4)
        assert to_json(run(root, replace(QUICK, noise_seeds=(2, 3))))["errors"] != to_json(one)["errors"]

    def test_errors_are_those_of_the_policy_itself(self, root):
        table = load_table(root / "dataset").table
        rows = choose_rows(len(table), QUICK)
        policy, text = model_factory.make_policy(), model_factory.TOKENIZER
        expected = []
        for row in rows:
            tokens, mask = text(f"{table.tasks[table.task[row]]}\nAdvantage: negative\n")
            noise = np.random.default_rng([0, row]).standard_normal((8, 4), np.float32)
            given = (table.images[row], table.state[row], tokens, mask, noise)
            with torch.inference_mode():
                chunk = policy.sample_actions(*(torch.from_numpy(array)[None] for array in given))
            expected.append(np.abs(chunk[0, 0].numpy() - table.action[row]))
        found = run(root, replace(QUICK, noise_seeds=(0,), prompts=("negative",)))
        np.testing.assert_allclose(found.errors["negative", ALL, "first"].mae, np.mean(expected, 0), rtol=1e-4)
        assert found.effects == {}

    def test_a_policy_that_reads_its_prompt_and_one_that_cannot(self, root, tmp_path):
        read = run(root).effects
        assert read["positive against negative"].mean > 0.01 and read["noise"].mean > 0
        deaf = shutil.copytree(root / "policy", tmp_path / "policy")
        from safetensors.torch import load_file, save_file

        weights = load_file(deaf / "model.safetensors")
        name = next(key for key in weights if key.endswith("embed.weight"))
        save_file({**weights, name: torch.zeros_like(weights[name])}, deaf / "model.safetensors")
        write_manifest(deaf, "policy", parameters=read_manifest(deaf).parameters)
        found = offline_error(deaf, root / "dataset", root / "advantage", QUICK)
        assert found.effects["positive against negative"].mean < 1e-5 < found.effects["noise"].mean
        same = [found.errors[prompt, ALL, "chunk"].mae for prompt in ("positive", "negative")]
        np.testing.assert_allclose(*same, rtol=1e-5)

    def test_guidance_moves_the_prompts_away_from_none_and_leaves_none_alone(self, root):
        plain, guided = run(root), run(root, replace(QUICK, beta=2.0))
        np.testing.assert_array_equal(plain.errors["none", ALL, "chunk"].mae, guided.errors["none", ALL, "chunk"].mae)
        assert guided.effects["positive against none"].mean > 1.5 * plain.effects["positive against none"].mean
        silent = run(root, replace(QUICK, beta=0.0)).effects["positive against none"].mean
        assert silent < 1e-5  # weight 0 is the unconditional policy

    def test_errors_are_split_by_the_labels_of_the_folder(self, root):
        settings = replace(QUICK, frames=1000, prompts=("positive",))
        found = run(root, settings)
        indicator = load_labels(root / "advantage", open_dataset(root / "dataset")).indicator
        counts = {key[1]: part.count for key, part in found.errors.items() if key[2] == "first"}
        assert counts == {ALL: len(indicator), "positive": (indicator == 1).sum(), "negative": (indicator == 0).sum()}
        bare = run(root, settings, labels=False)
        assert {key[1] for key in bare.errors} == {ALL, "none"} and bare.labels == ""


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"prompts": ()}, "--indicator: expected some of positive, negative, none, got ''"),
            ({"prompts": ("good",)}, "--indicator: expected some of positive, negative, none, got 'good'"),
            ({"beta": float("nan")}, "--beta: expected a finite guidance weight >= 0 (1 is none), got nan"),
            ({"beta": -1.0}, "--beta: expected a finite guidance weight >= 0 (1 is none), got -1.0"),
            ({"frames": 0}, "--frames: expected at least 1, got 0"),
            ({"batch_size": 0}, "--batch-size: expected at least 1, got 0"),
            ({"noise_seeds": (1, 1)}, "--noise-seeds: expected different numbers >= 0, got [1, 1]"),
            ({"noise_seeds": ()}, "--noise-seeds: expected different numbers >= 0, got []"),
            ({"seed": -1}, "--seed: expected a number >= 0, got -1"),
        ],
    )
    def test_settings(self, change, message):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            replace(QUICK, **change)

    def test_a_critic_and_another_robot(self, root, tmp_path):
        with pytest.raises(ManifestError, match="kind: expected 'policy', got 'critic'"):
            run(root, policy="critic")
        other = make_dataset(tmp_path, episodes=2)
        with pytest.raises(ValueError, match="cameras: expected"):
            offline_error(root / "policy", other, None, QUICK)

    def test_frames_are_drawn_by_the_seed_without_repetition(self):
        rows = choose_rows(100, QUICK)
        assert len(set(rows.tolist())) == QUICK.frames and (np.diff(rows) > 0).all() and 0 <= rows[0] <= rows[-1] < 100
        np.testing.assert_array_equal(rows, choose_rows(100, QUICK))
        assert rows.tolist() != choose_rows(100, replace(QUICK, seed=1)).tolist()
        np.testing.assert_array_equal(choose_rows(12, QUICK), np.arange(12))


class TestOutput:
    def test_the_command_ends_in_json_and_writes_a_page_that_stands_alone(self, root, tmp_path, capsys):
        out = tmp_path / "offline.html"
        command = ["offline", str(root / "policy"), "--dataset", str(root / "dataset"), "--frames", "8", "--out",
                   str(out), "--labels", str(root / "advantage"), "--noise-seeds", "0"]  # fmt: skip
        assert cli.main([*command, "--indicator", "positive", "negative", "--device", "cpu"]) == 0
        printed = capsys.readouterr().out
        report = json.loads(printed.splitlines()[-1])
        assert report["prompts"] == ["positive", "negative"] and report["frames"] == 8
        dims = [dim.name for dim in model_factory.ROBOT.action]
        assert list(report["errors"]["positive"]["all"]["first"]["mae"]) == dims
        assert set(report["effects_std"]) == {"positive against negative"}
        page = out.read_text()
        assert "Does the prompt matter?" in page and "prefers-color-scheme:dark" in page
        assert not re.search(r"""(?:src|href)=['"](?!data:|#)""", page)
        assert cli.main([*command, "--beta", "-2"]) == 2
        assert "--beta: expected a finite guidance weight" in capsys.readouterr().err

    def test_what_is_undefined_is_null_and_a_dash(self, root):
        report = run(root, replace(QUICK, noise_seeds=(0,)))
        key = ("positive", ALL, "first")
        hole = replace(report.errors[key], r2=np.full(4, np.nan))
        spoilt = replace(report, errors={**report.errors, key: hole})
        text = json.dumps(to_json(spoilt), allow_nan=False)
        assert set(json.loads(text)["errors"]["positive"]["all"]["first"]["r2"].values()) == {None}
        assert "<td>-</td>" in build_page(spoilt)

    def test_hostile_names_are_text(self, root):
        report = replace(run(root, replace(QUICK, prompts=("none",))), names=("<i>", "$\\frac{$", "a" * 90, "y"))
        page = build_page(report)
        assert "<i>" not in page and "<td>&lt;i&gt;</td>" in page and ">$\\frac{$<" in page
