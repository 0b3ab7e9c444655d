"""The probe finds out whether a prompt steers: a policy trained to go right when positive and left when negative."""

import json
from dataclasses import replace

import numpy as np
import pytest

from model_factory import save_policy
from recap_client.fleet import FleetError, FleetSettings, Job, run_fleet
from recap_model import cli
from recap_model.manifest import publish, write_manifest
from recap_model.normalize import NormStats
from recap_model.policy.config import PolicyConfig
from recap_model.policy.model import Policy
from recap_model.spec import PolicySpec
from recap_model.tokenizer import word_tokenizer
from slider_robot import SPEC, Slider
from training.checkpoint import write_checkpoint
from training.loader import FrameTable, Loader, Sampler
from training.loop import fit
from training.policy_loss import policy_loss
from training.presets import debug
from training.probe import CheckpointPolicy, ProbeError, Variant, compare, probe


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """A checkpoint of a policy trained on +0.5 in positive and -0.5 in negative frames."""
    rng, count = np.random.default_rng(0), 256
    indicator = rng.integers(0, 2, count).astype(np.int8)
    action = np.where(indicator == 1, 0.5, -0.5)[:, None].astype(np.float32)
    table = FrameTable(
        rng.integers(0, 256, (count, 1, 64, 64, 3), np.uint8), rng.normal(0, 1, (count, 1)).astype(np.float32), action,
        np.arange(1, count + 1), np.arange(count), np.zeros(count, np.int64), ("go",), indicator,
        np.zeros(count, np.float32),
    )  # fmt: skip
    stats = {"state": NormStats.of(table.state), "action": NormStats.of(action)}
    tokenizer, settings = word_tokenizer(("go",), 16), debug.policy()
    language = replace(settings.language, vocabulary=16)
    config = PolicyConfig(settings.vision, language, settings.expert, 1, 1, 1, 4, 16, 4)
    policy = Policy(config, stats)
    loader = Loader(table, tokenizer, chunk=4, dropout=0.2, shift=0, seed=0)
    sampler = Sampler(np.arange(count), 32, 0)
    folder = tmp_path_factory.mktemp("steered")
    fit_settings = replace(settings.fit, steps=120, batch_size=32, optim=replace(settings.fit.optim, lr=5e-3, ema=0.9))
    average = fit(policy, lambda step, generator: policy_loss(policy, loader(sampler(step), step), 2, generator),
                  fit_settings, folder / "work", what="slider", identity={})  # fmt: skip
    with publish(folder / "policy") as out:
        write_checkpoint(out, average.shadow, config.to_json(), PolicySpec(SPEC, 4, 16), tokenizer, stats)
        write_manifest(out, "policy")
    return folder / "policy"


EPISODES = {"tasks": ["go"], "episodes_per_task": 4, "first_seed": 5, "robot": "slider_robot:Slider", "workers": 1}


def test_a_steered_policy_succeeds_when_positive_and_fails_when_negative(steered, tmp_path):
    reports = probe(steered, [Variant("positive"), Variant("positive", 2.0), Variant("negative")], tmp_path, **EPISODES)
    rates = {name: report["overall"]["success_rate"] for name, report in reports.items()}
    assert rates == {"positive": 1.0, "positive-beta-2": 1.0, "negative": 0.0}
    steps = {name: report["overall"]["mean_steps"] for name, report in reports.items()}
    assert steps["positive-beta-2"] < steps["positive"] < steps["negative"] == 12  # guidance goes beyond the data
    ratio = compare(reports["negative"], reports["positive"])
    assert ratio == (0.0, 0.0, 0.0)
    written = json.loads((tmp_path / "negative" / "evaluation.json").read_text())
    assert written == json.loads(json.dumps(reports["negative"])) and written["policy"]["conditioning"] == "negative"


def test_a_variant_is_run_once_for_the_same_checkpoint_and_scenes(steered, tmp_path):
    told = []
    for _ in range(2):
        probe(steered, [Variant("none")], tmp_path, **EPISODES, on_result=lambda _, result: told.append(result))
    assert len(told) == 4
    probe(steered, [Variant("none")], tmp_path, **{**EPISODES, "first_seed": 6},
          on_result=lambda _, result: told.append(result))  # fmt: skip
    assert len(told) == 8


def test_without_noise_every_first_chunk_of_a_scene_is_the_same(steered, tmp_path):
    seen = Slider()
    seen.reset("go", 5)
    observation, chunks = seen.observe(), {}
    for scale in (0.0, 1.0):
        policy = CheckpointPolicy(SPEC, str(steered), "positive", 1.0, scale)
        chunks[scale] = []
        for seed in (1, 2):
            policy.reset("e", "go", seed)
            chunks[scale].append(policy.infer(observation, "go").actions)
    assert np.array_equal(*chunks[0.0]) and not np.array_equal(*chunks[1.0])
    told = []
    for scale in (1.0, 0.0):  # another scale is another evaluation; the old file, without one, was of 1
        probe(steered, [Variant("none")], tmp_path, **EPISODES, noise_scale=scale, on_result=lambda *r: told.append(r))
    assert len(told) == 8
    with pytest.raises(ProbeError, match="noise_scale: expected 0 to 1, got 2"):
        probe(steered, [Variant("none")], tmp_path, **EPISODES, noise_scale=2.0)


def test_the_command_prints_a_table_and_json(steered, tmp_path, capsys):
    command = ["probe", str(steered), "--out", str(tmp_path), "--tasks", "go", "--episodes-per-task", "2", "--robot",
               "slider_robot:Slider", "--workers", "1"]  # fmt: skip
    assert cli.main([*command, "--prompts", "positive", "negative"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["positive"]["success_rate"] == 1.0 and line["negative"] == {"success_rate": 0.0, "per_minute": 0.0,
                                                                              "ratio": 0.0}  # fmt: skip


def test_guidance_of_another_prompt_and_unknown_prompts_are_refused():
    with pytest.raises(ProbeError, match=r"beta: expected 1, or more with the prompt 'positive', got 2\.0"):
        Variant("negative", 2.0)
    with pytest.raises(ProbeError, match=r"prompt: expected one of \['negative', 'none', 'positive'\], got 'good'"):
        Variant("good")


def test_evaluations_of_other_scenes_are_not_compared():
    one = {"episodes": [{"task_name": "go", "seed": 1, "success": True, "steps": 3}]}
    with pytest.raises(ProbeError, match="expected the same tasks and seeds"):
        compare(one, {"episodes": [{**one["episodes"][0], "seed": 2}]})


def test_a_checkpoint_of_another_robot_is_refused(tmp_path):
    with pytest.raises(ValueError, match="robot against"):
        probe(save_policy(tmp_path / "other"), [Variant("positive")], tmp_path, **EPISODES)


def test_a_local_policy_that_cannot_be_imported_is_named():
    settings = FleetSettings("slider_robot:Slider", local=("training.probe:Missing", {}))
    with pytest.raises(FleetError, match=r"policy 'training\.probe:Missing': expected package\.module:Class"):
        run_fleet([Job("go", 0)], settings)
    with pytest.raises(FleetError, match="got both"):
        FleetSettings(policy_url="ws://127.0.0.1:1/act", local=("a:b", {}))
