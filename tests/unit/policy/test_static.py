"""The static graph computes what `Policy.sample_actions` computes; real-time chunking what LeRobot's processor does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lerobot.configs import RTCAttentionSchedule
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor

from model_factory import SMOLVLA, STATS, TASKS, TOKENIZER, inputs, make_policy
from recap_model import rtc
from recap_model.conditioning import unconditional_prompt
from recap_model.policy.config import PolicyConfig
from recap_model.policy.model import Policy
from recap_model.policy.static import GraphOptions, StaticPolicy, StaticPrefix

LAYOUTS = {
    "cross": SMOLVLA,
    "self": replace(SMOLVLA, expert=replace(SMOLVLA.expert, attention="self_attn")),
    "half": replace(SMOLVLA, expert=replace(SMOLVLA.expert, layers=2, self_attn_every=0)),
    "special": replace(SMOLVLA, image_tokens=(3, 4), empty_cameras=1),
    "conv": None,
}


def build(config: PolicyConfig | None) -> Policy:
    if config is None:
        return make_policy()
    torch.manual_seed(0)
    policy = Policy(config, STATS)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim < 2 else p[0].numel() ** -0.5)
    return policy.eval()


@pytest.fixture(scope="module", params=LAYOUTS, ids=list(LAYOUTS))
def policy(request):
    return build(LAYOUTS[request.param])


def observation(policy: Policy, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(batch, policy.config.chunk, policy.config.padded_action, generator=generator)
    return {**inputs(batch), "noise": noise}


def unconditional(batch: int) -> dict[str, torch.Tensor]:
    bare = [TOKENIZER(unconditional_prompt(TASKS[i % 2])) for i in range(batch)]
    names = ("unconditional_tokens", "unconditional_mask")
    return {name: torch.stack([torch.from_numpy(b[j]) for b in bare]) for j, name in enumerate(names)}


def run(policy: Policy, options: GraphOptions, x: dict[str, torch.Tensor]) -> torch.Tensor:
    graph = StaticPolicy(policy, options).eval()
    with torch.no_grad():
        return graph(*(x[name] for name in options.inputs))


@pytest.mark.parametrize("attention", ["matmul", "sdpa"])
def test_plain(policy, attention):
    x = observation(policy)
    with torch.no_grad():
        expected = policy.sample_actions(**x)
    torch.testing.assert_close(run(policy, GraphOptions(attention=attention), x), expected, atol=2e-5, rtol=1e-5)


def test_guided_with_a_beta_per_sample(policy):
    x = observation(policy) | unconditional(2) | {"beta": torch.tensor([1.0, 2.5])}
    with torch.no_grad():
        expected = policy.sample_actions_guided(**x)
    torch.testing.assert_close(run(policy, GraphOptions(guided=True), x), expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, limit", [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_half_precision_stays_close(policy, dtype, limit):
    x = observation(policy)
    difference = (run(policy, GraphOptions(dtype=dtype), x) - run(policy, GraphOptions(), x)).abs().max()
    assert 0 < difference < limit


def test_prefix_goes_flat_and_back(policy):
    graph = StaticPolicy(policy, GraphOptions()).eval()
    with torch.no_grad():
        prefix = graph.prepare(observation(policy))
    again = StaticPrefix.of(prefix.flat())
    assert all(a is b for a, b in zip(prefix.flat(), again.flat(), strict=True))


def chunking(policy: Policy, delay: int, horizon: int, schedule: rtc.Schedule = "linear", batch: int = 2):
    config, generator = policy.config, torch.Generator().manual_seed(9)
    weights = torch.from_numpy(rtc.prefix_weights(delay, horizon, config.chunk, schedule))
    return {
        "previous": torch.randn(batch, config.chunk, config.action_dim, generator=generator),
        "prefix_weights": weights.expand(batch, -1),
        "guidance_weights": torch.from_numpy(rtc.guidance_weights(config.denoise_steps)).expand(batch, -1),
    }


def test_zeros_switch_chunking_off(policy):
    x = observation(policy)
    off = {name: torch.zeros_like(value) for name, value in chunking(policy, 2, 6).items()}
    options = GraphOptions(rtc=True)
    torch.testing.assert_close(run(policy, options, x | off), run(policy, GraphOptions(), x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("guided", [False, True])
def test_chunking_holds_on_to_the_previous_chunk(policy, guided):
    x = observation(policy) | chunking(policy, 3, 6) | unconditional(2) | {"beta": torch.tensor([1.5, 1.5])}
    held = run(policy, GraphOptions(guided=guided, rtc=True), x)
    free = run(policy, GraphOptions(guided=guided), x)
    gap = lambda actions: (actions - x["previous"])[:, :3].abs().mean()  # noqa: E731
    assert gap(held) < 0.25 * gap(free)


@pytest.mark.parametrize("schedule", rtc.SCHEDULES)
def test_whole_chunk_equals_lerobots_processor(policy, schedule):
    """Our graph against our velocities driven by LeRobot's own RTCProcessor."""
    x, delay, horizon = observation(policy), 2, 6
    extra = chunking(policy, delay, horizon, schedule)
    config = RTCConfig(prefix_attention_schedule=RTCAttentionSchedule[schedule.upper()], execution_horizon=horizon)
    processor = RTCProcessor(config)
    steps = policy.config.denoise_steps
    with torch.no_grad():
        prefix = policy.read(policy.see(x["images"]), x["state"], x["tokens"], x["token_mask"])
        state = x["noise"]
        for i in range(steps):
            time = 1.0 - i / steps
            v = processor.denoise_step(
                state, policy.normalize_actions(extra["previous"]), delay, time,
                lambda y, t=time: policy.velocity(y, torch.full((2,), t), prefix),
            )  # fmt: skip
            state = state - v.detach() / steps
        expected = policy.scaling.physical(state)
    # every step feeds an error back with up to 10 times its size, in both implementations
    torch.testing.assert_close(run(policy, GraphOptions(rtc=True), x | extra), expected, atol=5e-5, rtol=1e-5)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 50), st.sampled_from(rtc.SCHEDULES))
def test_prefix_weights_are_lerobots(delay, horizon, chunk, schedule):
    horizon = min(horizon, chunk)
    processor = RTCProcessor(RTCConfig(prefix_attention_schedule=RTCAttentionSchedule[schedule.upper()]))
    theirs = processor.get_prefix_weights(delay, horizon, chunk).numpy()
    np.testing.assert_allclose(rtc.prefix_weights(delay, horizon, chunk, schedule), theirs, atol=1e-6)


def test_guidance_weights_are_lerobots():
    known = [10, 9.111, 4.25, 2.763, 2.167, 2.0, 2.167, 2.763, 4.25, 9.111]
    np.testing.assert_allclose(rtc.guidance_weights(10), known, atol=2e-3)


def test_bad_chunking_arguments_are_refused():
    with pytest.raises(ValueError, match=r"schedule: expected one of .* got 'cosine'"):
        rtc.prefix_weights(1, 2, 3, "cosine")
    with pytest.raises(ValueError, match="expected 0 or more control steps, got -1 and 2"):
        rtc.prefix_weights(-1, 2, 3)
    with pytest.raises(ValueError, match="expected a positive guidance weight, got 0"):
        rtc.guidance_weights(10, 0)
