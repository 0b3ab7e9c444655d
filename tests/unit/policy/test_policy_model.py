"""Laws of the policy's forward: who sees whom, and that guidance and batching change nothing they should not."""

import pytest
import torch

from model_factory import TASKS, TOKENIZER, inputs, make_critic, make_policy
from recap_model.conditioning import NEGATIVE, prompt, unconditional_prompt
from recap_model.policy.language import prefix_mask


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def sample(policy, x):
    with torch.no_grad():
        return policy.sample_actions(**x)


def test_padding_tokens_are_never_read(policy):
    x = inputs(2)
    changed = {**x, "tokens": torch.where(x["token_mask"], x["tokens"], 7)}
    assert not torch.equal(changed["tokens"], x["tokens"])
    torch.testing.assert_close(sample(policy, changed), sample(policy, x), atol=0, rtol=0)


def test_every_input_matters(policy):
    x = inputs(2)
    base = sample(policy, x)
    other = inputs(2, seed=9)
    for name in ("images", "state", "noise"):
        assert (sample(policy, {**x, name: other[name]}) - base).abs().max() > 1e-4, name
    ids, mask = TOKENIZER(prompt(TASKS[0], NEGATIVE))
    negative = {
        "tokens": torch.from_numpy(ids)[None].repeat(2, 1),
        "token_mask": torch.from_numpy(mask)[None].repeat(2, 1),
    }
    assert (sample(policy, {**x, **negative}) - base)[0].abs().max() > 1e-4


def test_a_sample_does_not_depend_on_its_batch(policy):
    x = inputs(4)
    whole = sample(policy, x)
    for i in range(4):
        alone = sample(policy, {k: v[i : i + 1] for k, v in x.items()})
        torch.testing.assert_close(alone[0], whole[i], atol=1e-5, rtol=1e-5)


def test_state_is_seen_by_nobody_before_it(policy):
    """The hidden states of images and text are the same whatever the state is."""
    x = inputs(1)
    hidden = []
    for state in (x["state"], x["state"] + 5):
        image_tokens = policy.see(x["images"])
        token = policy.state_in(state)[:, None]
        stream = torch.cat([image_tokens, policy.language.embed_text(x["tokens"]), token], 1)
        pad = torch.cat([torch.ones(1, image_tokens.shape[1]).bool(), x["token_mask"], torch.ones(1, 1).bool()], 1)
        mask, positions = prefix_mask(pad)
        hidden.append(policy.language(stream, mask, positions)[0])
    real = pad.clone()
    real[:, -1] = False
    assert torch.equal(hidden[0][real], hidden[1][real])
    assert not torch.equal(hidden[0][:, -1], hidden[1][:, -1])


def test_actions_are_causal(policy):
    """Changing a later noisy action leaves the velocity of earlier ones alone."""
    x = inputs(1)
    prefix = policy.read(policy.see(x["images"]), x["state"], x["tokens"], x["token_mask"])
    time = torch.full((1,), 0.5)
    later = x["noise"].clone()
    later[:, 5:] += 3
    a, b = policy.velocity(x["noise"], time, prefix), policy.velocity(later, time, prefix)
    torch.testing.assert_close(a[:, :5], b[:, :5], atol=1e-6, rtol=1e-6)
    assert (a[:, 5:] - b[:, 5:]).abs().max() > 1e-3


def test_repeated_prefix_is_the_prefix_of_a_repeated_batch(policy):
    x = inputs(2)
    read = (policy.see(x["images"]), x["state"], x["tokens"], x["token_mask"])
    repeated = policy.read(*read).repeat(3)
    direct = policy.read(*(v.repeat_interleave(3, 0) for v in read))
    assert torch.equal(repeated.pad, direct.pad)
    for (k, v), (k2, v2) in zip(repeated.keys, direct.keys, strict=True):
        torch.testing.assert_close(k, k2)
        torch.testing.assert_close(v, v2)


def test_guidance(policy):
    """beta = 1 is the conditional policy, beta = 0 the unconditional one, and beta acts per sample."""
    x = inputs(2)
    bare = [TOKENIZER(unconditional_prompt(TASKS[i])) for i in range(2)]
    tokens, mask = (torch.stack([torch.from_numpy(b[j]) for b in bare]) for j in (0, 1))

    def guided(beta):
        with torch.no_grad():
            return policy.sample_actions_guided(
                **x, unconditional_tokens=tokens, unconditional_mask=mask, beta=torch.tensor(beta)
            )

    unconditional = sample(policy, {**x, "tokens": tokens, "token_mask": mask})
    torch.testing.assert_close(guided([1.0, 1.0]), sample(policy, x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(guided([0.0, 0.0]), unconditional, atol=1e-5, rtol=1e-5)
    mixed = guided([1.0, 2.0])
    torch.testing.assert_close(mixed[0], sample(policy, x)[0], atol=1e-5, rtol=1e-5)
    assert (mixed[1] - sample(policy, x)[1]).abs().max() > 1e-4


def test_critic_value_is_the_mean_of_its_distribution_and_within_the_support():
    critic, x = make_critic(), inputs(3)
    with torch.no_grad():
        value, p = critic(x["images"], x["state"], x["tokens"], x["token_mask"])
    torch.testing.assert_close(p.sum(1), torch.ones(3))
    torch.testing.assert_close(value, (p * torch.linspace(-1, 0, 201)).sum(1))
    assert ((value >= -1) & (value <= 0)).all()


def test_rope_and_time_embedding_are_lerobots():
    """The building blocks that have no parameters equal LeRobot's SmolVLA."""
    from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding
    from lerobot.policies.smolvla.smolvlm_with_expert import apply_rope

    from recap_model.policy.expert import time_embedding
    from recap_model.policy.language import rope

    x, positions = torch.randn(2, 7, 3, 16), torch.arange(14).reshape(2, 7)
    torch.testing.assert_close(rope(x, positions), apply_rope(x, positions))
    time = torch.rand(5)
    theirs = create_sinusoidal_pos_embedding(time, 24, 4e-3, 4.0, device=torch.device("cpu")).float()
    torch.testing.assert_close(time_embedding(time, 24, 4e-3, 4.0), theirs, atol=2e-4, rtol=1e-4)
