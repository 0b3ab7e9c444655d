"""Training-time real-time chunking (arXiv 2512.05964): the first actions of a chunk given as they are, the others
continue them; in the loss, in the policy and in the static graph."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_factory import SMOLVLA, STATS, TOKENIZER, inputs, make_policy, make_table
from recap_model import rtc
from recap_model.guidance import combine
from recap_model.policy import flow
from recap_model.policy.model import Policy, pair
from recap_model.policy.static import GraphOptions, StaticPolicy
from training.loader import Loader, Part
from training.policy_loss import given_rows, policy_loss

TABLE = make_table()
ROWS = np.array([0, 3, 9, 20, 33])
MOST = 5


def build(kind: str, most: int = MOST) -> Policy:
    torch.manual_seed(0)
    policy = make_policy() if kind == "conv" else Policy(SMOLVLA, STATS)
    torch.nn.init.normal_(policy.expert.action_out.weight, std=0.3)
    policy.config = replace(policy.config, max_delay=most)
    return policy.eval()


def observation(policy: Policy, delay: int) -> dict[str, torch.Tensor]:
    config, generator = policy.config, torch.Generator().manual_seed(3)
    bare = [TOKENIZER("no clause") for _ in range(2)]
    return {
        **inputs(2),
        "unconditional_tokens": torch.stack([torch.from_numpy(ids) for ids, _ in bare]),
        "unconditional_mask": torch.stack([torch.from_numpy(mask) for _, mask in bare]),
        "beta": torch.tensor([1.0, 2.5]),
        "noise": torch.randn(2, config.chunk, config.padded_action, generator=generator),
        "previous": torch.randn(2, config.chunk, config.action_dim, generator=generator),
        "prefix_weights": torch.from_numpy(rtc.prefix_weights(delay, delay, config.chunk)).expand(2, -1),
        "guidance_weights": torch.from_numpy(rtc.inpainting_weights(config.denoise_steps)).expand(2, -1),
    }


def run(policy: Policy, options: GraphOptions, x: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return StaticPolicy(policy, options).eval()(*(x[name] for name in options.inputs))


def by_hand(policy: Policy, x: dict[str, torch.Tensor], delay: int, guided: bool) -> torch.Tensor:
    """The paper's sampler with the eager policy: given rows at time 0 and put back before every step."""
    with torch.no_grad():
        seen, state, tokens, mask = policy.see(x["images"]), x["state"], x["tokens"], x["token_mask"]
        if guided:
            seen, state = pair(seen, seen), pair(state, state)
            tokens, mask = pair(tokens, x["unconditional_tokens"]), pair(mask, x["unconditional_mask"])
        prefix, before = policy.read(seen, state, tokens, mask), policy.normalize_actions(x["previous"])
        now, steps = x["noise"].clone(), policy.config.denoise_steps
        for t in flow.times(steps):
            now[:, :delay] = before[:, :delay]
            time = torch.full(now.shape[:2], t)
            time[:, :delay] = 0.0
            if guided:
                v = policy.velocity(pair(now, now), pair(time, time), prefix)
                v = combine(*v.unflatten(0, (2, -1)).unbind(0), x["beta"][:, None, None])
            else:
                v = policy.velocity(now, time, prefix)
            now = now - v / steps
        now[:, :delay] = before[:, :delay]
        return policy.scaling.physical(now)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("delay", [1, 3, MOST])
@pytest.mark.parametrize("kind", ["conv", "smolvla"])
def test_the_graph_is_the_papers_sampler(kind, delay, guided):
    policy = build(kind)
    x = observation(policy, delay)
    ours = run(policy, GraphOptions(guided=guided, rtc=True), x)
    torch.testing.assert_close(ours, by_hand(policy, x, delay, guided), atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(ours[:, :delay], x["previous"][:, :delay], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "smolvla"])
def test_what_is_given_changes_what_follows_and_nothing_given_changes_nothing(kind):
    policy = build(kind)
    x = observation(policy, 3)
    other = x | {"previous": x["previous"] + 1.0}
    options = GraphOptions(rtc=True)
    assert (run(policy, options, other) - run(policy, options, x))[:, 3:].abs().max() > 1e-3
    off = x | {name: torch.zeros_like(x[name]) for name in ("previous", "prefix_weights", "guidance_weights")}
    torch.testing.assert_close(run(policy, options, off), run(policy, GraphOptions(), x), atol=1e-6, rtol=1e-6)


def test_one_time_for_all_actions_is_the_same_time_for_each():
    policy = build("conv")
    x = observation(policy, 0)
    with torch.no_grad():
        prefix = policy.read(policy.see(x["images"]), x["state"], x["tokens"], x["token_mask"])
        time = torch.tensor([0.3, 0.8])
        each = time[:, None].expand(-1, policy.config.chunk)
        assert torch.equal(policy.velocity(x["noise"], time, prefix), policy.velocity(x["noise"], each, prefix))
    one, every = (flow.interpolate(x["noise"], x["noise"] + 1, t)[0] for t in (time, each))
    assert torch.equal(one, every)


@given(st.integers(1, 7), st.integers(0, 2**31))
def test_given_rows_are_the_first_and_never_all(most, seed):
    config = replace(make_policy().config, max_delay=most)
    rows = given_rows(64, config, torch.Generator().manual_seed(seed))
    assert rows.shape == (64, config.chunk)
    counts = rows.sum(1)
    assert torch.equal(rows, torch.arange(config.chunk) < counts[:, None]) and counts.max() <= most
    assert len(counts.unique()) == most + 1  # 64 draws: every delay comes up, none included


def test_a_given_action_is_seen_clean_and_costs_nothing():
    """The loss by hand: with the draws of the loss itself, errors of the given rows left out of the sum."""
    policy = build("conv", 7)
    batch = Loader(TABLE, TOKENIZER, chunk=8, dropout=0.0, shift=0, seed=0)(ROWS, 0)
    with torch.no_grad():
        loss = policy_loss(policy, batch, 1, torch.Generator().manual_seed(3), "fp32")
        draw = torch.Generator().manual_seed(3)
        actions = policy.normalize_actions(torch.from_numpy(batch.actions))
        noise, time = torch.randn(actions.shape, generator=draw), flow.sample_time(len(ROWS), draw)
        rows = given_rows(len(ROWS), policy.config, draw)
        noisy = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
        noisy[rows] = actions[rows]
        times = time[:, None].repeat(1, 8)
        times[rows] = 0.0
        arrays = map(torch.from_numpy, (batch.state, batch.tokens, batch.token_mask))
        prefix = policy.read(policy.see(torch.from_numpy(batch.images)).float(), *arrays)
        squares = (policy.velocity(noisy, times, prefix) - (noise - actions)) ** 2
    valid = torch.from_numpy(batch.valid)
    expected = squares[valid & ~rows].sum() / (valid.sum() * actions.shape[2])
    assert rows.any() and loss.item() == pytest.approx(expected.item(), rel=1e-5)


@settings(max_examples=6)
@given(st.integers(2, 5), st.integers(0, 2**31))
def test_parts_of_a_step_add_up_with_delays_too(count, seed):
    policy, rows = build("conv"), np.arange(4, 4 + 3 * count)
    load = Loader(TABLE, TOKENIZER, chunk=8, dropout=0.0, shift=0, seed=0)

    def loss(part: Part) -> float:
        return policy_loss(policy, load(rows, 0, part=part), 2, torch.Generator().manual_seed(seed), "fp32").item()

    with torch.no_grad():
        assert sum(loss(Part(i, count)) for i in range(count)) == pytest.approx(loss(Part()), rel=1e-5)
