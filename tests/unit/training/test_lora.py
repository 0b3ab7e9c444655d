"""Low-rank adapters: what they may touch, and that the published checkpoint is the adapted policy in plain weights."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edited_datasets import write_dataset
from model_factory import SMOLVLA, STATS, inputs, make_policy
from recap_model.cli import main
from recap_model.policy.load import load_policy
from recap_model.policy.model import Policy
from recap_model.policy.weights import read_weights
from training import lora
from training.presets import debug

SETTINGS = replace(debug.policy(), lora=4)
TRAIN = ["train", "policy", "--mode", "imitation", "--preset", "debug", "--steps", "4", "--batch-size", "6"]


def smolvla() -> Policy:
    """Its image tower has layers of the same names as the language model."""
    torch.manual_seed(0)
    return Policy(SMOLVLA, STATS)


@pytest.mark.parametrize(("train", "parts"), [("all", {"language", "expert"}), ("expert", {"expert"})])
def test_the_pattern_takes_all_projections_of_language_and_expert_and_never_the_image_tower(train, parts):
    pattern = re.compile(lora.adapted_layers(replace(SETTINGS, train=train)))
    linear = {name for name, module in smolvla().named_modules() if isinstance(module, torch.nn.Linear)}
    taken = {name for name in linear if pattern.fullmatch(name)}
    assert {name.split(".")[0] for name in taken} == parts
    assert taken == {name for name in linear if name.split(".")[0] in parts and ".layers." in name}
    assert any(re.fullmatch(r"vision\.layers\.\d+\.q", name) for name in linear)


def test_without_its_package_the_flag_names_what_installs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main([*TRAIN, "--dataset", str(tmp_path), "--lora", "4", "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert "needs the Python package 'peft'" in said and "recap-stack[train]" in said


def test_without_the_flag_the_package_is_not_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    lora.require_lora(debug.policy(), None)
    with pytest.raises(ModuleNotFoundError):
        lora.require_lora(SETTINGS, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """base/ and, from it, adapted/ (language and expert) and tokens/ (action tokens too)."""
    root = tmp_path_factory.mktemp("lora")
    data = [*TRAIN, "--dataset", str(write_dataset(root / "dataset", (9, 12, 10)))]
    assert main(["fit-fast", str(root / "dataset"), "--chunk", "8", "--out", str(root / "fast")]) == 0
    assert main([*data, "--out", str(root / "base")]) == 0
    adapted = [*data, "--init", str(root / "base"), "--lora", "4"]
    assert main([*adapted, "--out", str(root / "adapted")]) == 0
    fast = ["--fast", str(root / "fast"), "--insulate"]
    assert main([*adapted, *fast, "--out", str(root / "tokens")]) == 0
    return root


def changed(run: Path, name: str) -> set[str]:
    before, after = read_weights(run / "base"), read_weights(run / name)
    return {n for n in after if n not in before or not torch.equal(before[n], after[n])}


def test_the_checkpoint_is_plain_and_only_what_was_adapted_or_trains_whole_differs(run):
    assert read_weights(run / "adapted").keys() == read_weights(run / "base").keys()
    policy, pattern = load_policy(run / "adapted")[0], re.compile(lora.adapted_layers(SETTINGS))
    names = {n for n, _ in policy.named_parameters()}
    adapted = {n for n in names if pattern.fullmatch(n.removesuffix(".weight"))}
    whole = {n for n in names if n.startswith(("state_in", "expert.action_", "expert.time_"))}
    # the last layer ends at its keys and values: no loss reaches what lies behind
    last = f"language.layers.{policy.expert.depth - 1}."
    idle = {n for n in adapted if n.startswith((last + "q", last + "o", last + "mlp"))}
    assert changed(run, "adapted") == (adapted - idle) | whole and whole and adapted
    assert not [n for n in changed(run, "adapted") if n.startswith("vision")]


def test_the_action_head_and_the_projections_are_trained_and_published(run):
    """The known mistake: adapters are saved, the head that was trained beside them is not."""
    saved = load_file(run / "adapted" / "adapter" / "trained.safetensors")
    published = read_weights(run / "adapted")
    assert "expert.action_out.weight" in saved and "state_in.bias" in saved
    assert all(torch.equal(published[name], tensor) for name, tensor in saved.items())
    assert saved.keys() <= changed(run, "adapted")


def test_base_adapter_and_trained_weights_make_the_checkpoint_in_peft_itself(run):
    from peft import PeftModel

    base = load_policy(run / "base")[0]
    base.load_state_dict(load_file(run / "adapted" / "adapter" / "trained.safetensors"), strict=False)
    theirs = PeftModel.from_pretrained(base, run / "adapted" / "adapter").merge_and_unload()
    for name, tensor in read_weights(run / "adapted").items():
        torch.testing.assert_close(theirs.get_parameter(name), tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [make_policy, smolvla])
def test_merged_weights_compute_what_the_adapted_policy_computes(make):
    policy, plain = make(), make().eval()
    lora.adapt(policy, SETTINGS, tokens=False)
    x = inputs(2)
    x["noise"] = torch.randn(2, 8, policy.config.padded_action, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = policy.eval().sample_actions(**x)
        torch.testing.assert_close(before, plain.sample_actions(**x), atol=0, rtol=0)  # adapters begin at nothing
        weights = {n: p.detach() + 0.05 * torch.randn_like(p) for n, p in policy.named_parameters()}
        merged = lora.merge(policy, weights)
        plain.load_state_dict(merged, strict=True)
        after = policy.sample_actions(**x)
        torch.testing.assert_close(plain.sample_actions(**x), after, atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 1e-2


def test_action_tokens_train_embedding_and_head_beside_the_adapters(run):
    policy = load_policy(run / "tokens")[0]
    named = changed(run, "tokens")
    assert {"language.embed.weight", "language.head.weight", "language.norm.weight"} <= named
    assert not [n for n in named if n.startswith("vision")] and policy.config.language.head
    assert "language.head.weight" in load_file(run / "tokens" / "adapter" / "trained.safetensors")


def test_a_run_goes_on_where_it_was_interrupted(run, tmp_path):
    """Adapters begin the same from the same seed, so a repeated command is the same run."""
    command = [*TRAIN, "--dataset", str(run / "dataset"), "--init", str(run / "base"), "--lora", "4"]
    assert main([*command, "--out", str(tmp_path / "again")]) == 0
    again, first = read_weights(tmp_path / "again"), read_weights(run / "adapted")
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lora", "0"], "--lora: expected a rank of at least 1, got 0"),
        (["--lora", "4"], "expected --init CHECKPOINT"),
    ],
)
def test_a_rank_and_a_checkpoint_are_needed(run, tmp_path, capsys, options, said):
    assert main([*TRAIN, "--dataset", str(run / "dataset"), *options, "--out", str(tmp_path / "x")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
