"""A step cut into micro-batches is the same step: rows, draws, weights, schedule, counts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_factory import TOKENIZER, make_critic, make_policy, make_table
from training.critic_loss import critic_loss
from training.loader import Loader, Part, Sampler
from training.loop import autocast_vision, fit
from training.optim import OptimConfig, rate
from training.policy import policy_loss
from training.presets import debug
from training.settings import FitSettings

TABLE = make_table((5, 12, 60))  # many chunks run past the end of their episode
FIT = FitSettings(
    steps=6, batch_size=64, save_every=4, log_every=2, precision="fp32", device="cpu", optim=OptimConfig(warmup=2)
)


def loader(**kw):
    return Loader(TABLE, TOKENIZER, **{"chunk": 8, "dropout": 0.3, "shift": 2, "seed": 0, **kw})


def train(work, fit_settings, kind="policy", **critic):
    """(weights before, after, lines of the metrics, parts the loss was asked for)."""
    module = make_policy().train() if kind == "policy" else make_critic().eval()  # nn.Dropout's masks differ: off
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    sampler, load, asked = Sampler(np.arange(len(TABLE)), fit_settings.rows_per_step, 0), loader(), []
    chosen = replace(debug.critic(), fit=fit_settings, **critic)

    def loss_step(step, generator, part):
        asked.append((step, part))
        batch = load(sampler(step), step, part=part)
        if kind == "policy":
            return policy_loss(module, batch, 2, generator, fit_settings.precision)
        return critic_loss(module, batch, chosen, generator)

    fit(module, loss_step, fit_settings, work, what="test", identity={}, parts=True)
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return before, {name: p.detach() for name, p in module.named_parameters()}, lines, asked


@pytest.mark.parametrize(
    ("kind", "critic"), [("policy", {}), ("critic", {"end_weight": 4.0, "state_dropout": 0.3}), ("critic", {})]
)
def test_64_rows_at_once_and_16_rows_four_times_are_the_same_step(tmp_path, kind, critic):
    fit_settings = replace(FIT, steps=1)
    steps = [train(tmp_path / f"{b}x{k}", replace(fit_settings, batch_size=b, accumulate=k), kind, **critic)
             for b, k in ((64, 1), (16, 4))]  # fmt: skip
    (_, _, whole, _), (_, _, cut, asked) = steps
    assert cut[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
    assert cut[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)
    assert asked == [(0, Part(i, 4)) for i in range(4)]


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_a_run_of_micro_batches_ends_at_the_same_parameters(tmp_path, kind):
    before, whole, lines, _ = train(tmp_path / "64x1", FIT, kind)
    _, cut, cut_lines, asked = train(tmp_path / "16x4", replace(FIT, batch_size=16, accumulate=4), kind)
    # the first convolution has a group a channel, so normalisation takes its bias out again: the gradient is rounding
    # alone, which Adam scales up to a full step of either sign
    assert np.mean([not torch.equal(value, before[name]) for name, value in whole.items()]) > 0.8
    for name in whole.keys() - {"vision.convs.0.bias"}:
        assert (whole[name] - cut[name]).norm() <= 1e-5 * whole[name].norm(), name
    # every count is of optimiser steps: the schedule ends at its floor, the lines are those of the whole batch
    assert [line["step"] for line in cut_lines] == [line["step"] for line in lines] == [2, 4, 6]
    assert [line["lr"] for line in cut_lines] == [rate(step - 1, 6, FIT.optim) for step in (2, 4, 6)]
    assert [step for step, _ in asked] == [step for step in range(6) for _ in range(4)]


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 3))
def test_parts_are_the_batch_in_order_and_their_shares_add_up(total, count, step):
    rows = np.random.default_rng([total, step]).integers(0, len(TABLE), total)
    if count > total:
        with pytest.raises(ValueError, match=f"at least one row for each of {count} micro-batches.*got {total} rows"):
            loader()(rows, step, part=Part(0, count))
        return
    whole = loader()(rows, step)
    parts = [loader()(rows, step, part=Part(i, count)) for i in range(count)]
    for name in ("images", "state", "tokens", "token_mask", "actions", "valid", "target"):
        np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))
    assert whole.share() == whole.valid_share() == 1.0
    assert sum(p.share() for p in parts) == pytest.approx(1.0)
    assert sum(p.valid_share() for p in parts) == pytest.approx(1.0)
    sizes = [len(p.state) for p in parts]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=8)
@given(st.integers(2, 5), st.integers(0, 2**31))
def test_shares_of_the_policy_loss_add_up_to_the_loss_of_the_batch(count, seed):
    policy = make_policy().eval()
    rows = np.arange(4, 4 + 3 * count)  # around the ends of two episodes: the parts differ in valid actions

    def loss(part):
        generator = torch.Generator().manual_seed(seed)
        return policy_loss(policy, loader()(rows, 0, part=part), 2, generator, "fp32").item()

    with torch.no_grad():
        assert sum(loss(Part(i, count)) for i in range(count)) == pytest.approx(loss(Part()), rel=1e-5)


def test_a_loss_of_whole_steps_cannot_be_cut(tmp_path):
    policy = make_policy()
    with pytest.raises(ValueError, match=r"expected a loss that takes parts of a step \(parts=True\)"):
        fit(policy, lambda *_: None, replace(FIT, accumulate=2), tmp_path, what="test", identity={})
    with pytest.raises(ValueError, match="accumulate: expected at least 1 micro-batch an optimiser step, got 0"):
        fit(policy, lambda *_: None, replace(FIT, accumulate=0), tmp_path, what="test", identity={}, parts=True)


def test_precision_reaches_every_product(tmp_path):
    policy, batch = make_policy().train(), loader()(np.arange(16), 0)
    seen = {}

    def note(name):
        def hook(_module, _inputs, output):
            seen[name] = output.dtype

        return hook

    policy.vision.project.register_forward_hook(note("vision"))
    linear = next(m for m in policy.language.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(note("language"))
    found = {}
    for precision in ("auto", "fp32", "bf16"):
        seen.clear()

        def loss_step(_step, generator, _part, precision=precision):
            return policy_loss(policy, batch, 1, generator, precision)

        one = replace(FIT, steps=1, precision=precision)
        fit(policy, loss_step, one, tmp_path / precision, what="test", identity={}, parts=True)
        found[precision] = (seen["vision"], seen["language"])
    low, full = torch.bfloat16, torch.float32
    assert found == {"auto": (low, full), "fp32": (full, full), "bf16": (low, low)}
    assert all(p.dtype == full and torch.isfinite(p).all() for p in policy.parameters())
    with autocast_vision(policy, "fp32"):
        assert not torch.is_autocast_enabled("cpu")
