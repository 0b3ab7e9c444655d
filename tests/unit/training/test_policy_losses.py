"""What the losses of a policy reach and what they do not: flow matching, FAST action tokens, knowledge insulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from model_factory import SMOLVLA, STATS, TOKENIZER, make_policy, make_table
from recap_model.normalize import normalize
from recap_model.policy.fast_tokenizer import fit_fast
from recap_model.policy.language import prefix_mask
from recap_model.policy.model import Policy
from training.action_tokens import ActionTokens, normalized_chunks, prepare
from training.loader import Loader, Part
from training.policy_loss import Terms, extend, flow_loss, policy_loss, read
from training.presets import debug

TABLE = make_table()
SETTINGS = debug.policy()
ROWS = np.array([0, 3, 9, 20, 33])


def fitted(vocabulary=64):
    chunks = np.concatenate(list(normalized_chunks(TABLE.action, TABLE.end, STATS["action"], 8)))
    return fit_fast(chunks, scale=4, vocabulary=vocabulary)


def loader(table=TABLE):
    return Loader(table, TOKENIZER, chunk=8, dropout=0.0, shift=0, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fast")
    fitted().save(path)
    return path


def build(kind, folder=None) -> tuple[Policy, ActionTokens | None]:
    """A policy of the debug preset ("conv") or of SmolVLA's layers, with action tokens where there is a folder."""
    torch.manual_seed(0)
    policy = make_policy().train() if kind == "conv" else Policy(SMOLVLA, STATS)
    torch.nn.init.normal_(policy.expert.action_out.weight, std=0.3)
    if folder is None:
        return policy, None
    return policy, prepare(policy, SETTINGS, folder, None, TABLE, STATS["action"], loader().prompt_ids())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor | None]:
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in policy.named_parameters()}


def is_backbone(name: str) -> bool:
    return name.startswith(("vision.", "language.", "state_in."))


def unread(policy: Policy, name: str) -> bool:
    """Weights that no flow loss reaches anyhow: the head, and what lies behind the last keys that the expert reads."""
    last = f"language.layers.{policy.expert.depth - 1}."
    behind = tuple(last + part for part in ("q.", "o.", "post_norm.", "mlp."))
    return name.startswith(("language.norm.", "language.head.", *behind))


@pytest.mark.parametrize("kind", ["conv", "smolvla"])
def test_without_insulation_the_flow_loss_reaches_the_backbone(kind):
    policy, _ = build(kind)
    grads = gradients(policy, policy_loss(policy, loader()(ROWS, 0), 2, generator()))
    reached = {name for name, grad in grads.items() if grad is not None and grad.abs().max() > 0}
    assert {name for name in grads if not unread(policy, name)} == reached


@pytest.mark.parametrize("kind", ["conv", "smolvla"])
def test_with_insulation_the_flow_loss_reaches_the_expert_alone_and_all_of_it(kind):
    """The expert's own projections of the prefix's keys and values are its to learn: they lie behind the stop."""
    policy, _ = build(kind)
    loss = policy_loss(policy, loader()(ROWS, 0), 2, generator(), terms=Terms(insulate=True))
    grads = gradients(policy, loss)
    assert {name for name, grad in grads.items() if grad is not None} == {n for n in grads if not is_backbone(n)}
    assert all(grad.abs().max() > 0 for grad in grads.values() if grad is not None)


@pytest.mark.parametrize("kind", ["conv", "smolvla"])
def test_the_action_tokens_reach_all_of_the_backbone_and_nothing_of_the_expert(kind, folder):
    policy, tokens = build(kind, folder)
    batch = loader()(ROWS, 0)
    seen = policy.see(torch.from_numpy(batch.images)).float()
    grads = gradients(policy, read(policy, seen, batch, Terms(tokens))[1])
    reached = {name for name, grad in grads.items() if grad is not None and grad.abs().max() > 0}
    assert reached == {name for name in grads if is_backbone(name)}


def test_insulated_the_two_losses_train_disjoint_weights(folder):
    """KI equation 4: alpha can be 1, since each loss applies to weights of its own."""
    policy, tokens = build("smolvla", folder)
    batch = loader()(ROWS, 0)
    both = gradients(policy, policy_loss(policy, batch, 2, generator(), terms=Terms(tokens, 3.0, insulate=True)))
    seen = policy.see(torch.from_numpy(batch.images)).float()
    token_alone = gradients(policy, read(policy, seen, batch, Terms(tokens))[1])
    prefix, _ = read(policy, seen, batch, Terms(insulate=True))
    flow_alone = gradients(policy, flow_loss(policy, prefix, batch, 2, generator()))
    for name, grad in both.items():
        expected = 3.0 * token_alone[name] if is_backbone(name) else flow_alone[name]
        torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["conv", "smolvla"])
def test_the_prefix_is_that_of_inference_whatever_action_tokens_stand_behind_it(kind, folder):
    policy, tokens = build(kind, folder)
    batch = loader()(ROWS, 0)
    seen = policy.see(torch.from_numpy(batch.images)).float()
    arrays = [torch.from_numpy(array) for array in (batch.state, batch.tokens, batch.token_mask)]
    plain, (with_tokens, _) = policy.read(seen, *arrays), read(policy, seen, batch, Terms(tokens))
    # positions of padding see nothing and are seen by nothing: what stands there is left open
    real = plain.pad
    for ours, theirs in zip(with_tokens.keys, plain.keys, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one[real], other[real], atol=1e-5, rtol=1e-5)
    noisy, time = torch.randn(len(ROWS), 8, policy.config.padded_action, generator=generator()), torch.full((5,), 0.3)
    velocities = [policy.velocity(noisy, time, prefix) for prefix in (with_tokens, plain)]
    torch.testing.assert_close(*velocities, atol=1e-5, rtol=1e-5)
    x, pad = policy.embed_prefix(seen, *arrays)
    caches = []
    for fill in (tokens.first, tokens.first + 7):
        behind = policy.language.embed_text(torch.full((len(x), 5), fill))
        caches.append(policy.language(torch.cat([x, behind], 1), *extend(*prefix_mask(pad), pad, 5))[1])
    for (k, v), (other_k, other_v) in zip(*caches, strict=True):
        assert torch.equal(k[:, : x.shape[1]][real], other_k[:, : x.shape[1]][real])
        assert torch.equal(v[:, : x.shape[1]][real], other_v[:, : x.shape[1]][real])
        assert not torch.equal(v, other_v)


def test_the_cross_entropy_is_that_of_saying_one_token_after_the_other(folder):
    policy, tokens = build("smolvla", folder)
    batch = loader()(ROWS, 0)
    seen = policy.see(torch.from_numpy(batch.images)).float()
    with torch.no_grad():
        loss = read(policy, seen, batch, Terms(tokens))[1]
        x, pad = policy.embed_prefix(seen, *map(torch.from_numpy, (batch.state, batch.tokens, batch.token_mask)))
        ids, learned = tokens(batch)
        means = []
        for row in range(len(ROWS)):
            said = torch.from_numpy(ids[row][learned[row]])
            assert said[-1] == tokens.end and (said[:-1] != tokens.end).all()
            losses = []
            for t in range(len(said)):  # a pass of its own for each token, that sees no later one
                behind = policy.language.embed_text(said[None, :t])
                stream = torch.cat([x[row : row + 1], behind], 1)
                own = pad[row : row + 1]
                hidden, _ = policy.language(stream, *extend(*prefix_mask(own), own, t))
                losses.append(-policy.language.logits(hidden)[0, -1].log_softmax(-1)[said[t]])
            means.append(torch.stack(losses).mean())
    torch.testing.assert_close(loss, torch.stack(means).mean(), atol=1e-5, rtol=1e-5)


def test_the_tokens_of_a_batch_are_those_of_its_actions_normalised_once(folder):
    """smolva-rl normalises by quantiles what its preprocessor has normalised already, and has no end of the actions."""
    policy, tokens = build("conv", folder)
    batch = loader()(ROWS, 0)
    ids, learned = tokens(batch)
    for row in range(len(ROWS)):
        said = ids[row][learned[row]]
        assert said[-1] == tokens.end and (ids[row][~learned[row]] == tokens.end).all()
        expected = normalize(batch.actions[row], STATS["action"], "quantile")
        np.testing.assert_allclose(tokens.fast.decode(said[:-1] - tokens.first), expected, atol=np.sqrt(8) / 8 + 1e-5)
    assert policy.config.language.vocabulary >= tokens.end + 1 and tokens.first == 24
    assert (ids >= tokens.first).all() and (ids <= tokens.end).all()


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_the_shares_of_parts_add_up(folder, parts):
    policy, tokens = build("conv", folder)
    mask = np.random.default_rng(0).random(TABLE.action.shape) < 0.95
    draw = loader(replace(TABLE, action_mask=mask, action_is_pad=np.arange(len(TABLE)) % 7 == 6))
    rows, terms = np.arange(2, 45, 4), Terms(tokens, 0.7, insulate=True)
    whole = policy_loss(policy, draw(rows, 0), 2, generator(), "fp32", terms)
    shares = [
        policy_loss(policy, draw(rows, 0, part=Part(i, parts)), 2, generator(), "fp32", terms) for i in range(parts)
    ]
    torch.testing.assert_close(torch.stack(shares).sum(), whole, atol=1e-5, rtol=1e-5)


def test_action_tokens_can_be_learned(folder):
    policy, tokens = build("conv", folder)
    batch, terms = loader()(ROWS, 0), Terms(tokens)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = read(policy, policy.see(torch.from_numpy(batch.images)).float(), batch, terms)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(policy.config.language.vocabulary), rel=0.2)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("kind", ["conv", "smolvla"])
def test_a_larger_vocabulary_changes_no_action(kind, folder):
    plain, (grown, tokens) = build(kind)[0].eval(), build(kind, folder)
    batch = loader()(ROWS, 0)
    arrays = [torch.from_numpy(a) for a in (batch.images, batch.state, batch.tokens, batch.token_mask)]
    noise = torch.randn(len(ROWS), 8, plain.config.padded_action, generator=generator())
    with torch.no_grad():
        assert torch.equal(plain.sample_actions(*arrays, noise), grown.eval().sample_actions(*arrays, noise))
    own = grown.language.embed.weight[: tokens.first]
    assert torch.equal(own, plain.language.embed.weight)
    fresh = grown.language.embed.weight[tokens.first : tokens.end + 1].norm(dim=1)
    torch.testing.assert_close(fresh, own.norm(dim=1).mean().expand_as(fresh))
    assert Policy(type(grown.config).from_json(grown.config.to_json()), STATS).state_dict().keys() == (
        grown.state_dict().keys()
    )


def test_coefficients_that_the_tokenizer_cannot_say_are_counted(folder, capsys):
    far = TABLE.action.copy()
    far[5] += 300
    policy = make_policy()
    table = replace(TABLE, action=far)
    tokens = prepare(policy, SETTINGS, folder, None, table, STATS["action"], loader().prompt_ids())
    said = " ".join(capsys.readouterr().out.split())
    assert "of 1504 coefficients lie outside" in said and "fit a tokenizer on this data (`recap fit-fast`)" in said
    assert 0 < tokens.clamped < 0.5
    ids, learned = tokens(loader(table)(np.array([5]), 0))
    span = tokens.fast.span
    assert tokens.fast.parse(ids[0][learned[0]][:-1] - tokens.first).max() == span[1]


def test_a_block_of_ids_may_lie_inside_the_vocabulary(folder):
    language = replace(SMOLVLA.language, vocabulary=500, head=True)
    policy = Policy(replace(SMOLVLA, language=language), STATS)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    settings = replace(SETTINGS, losses=replace(SETTINGS.losses, fast_ids=400))
    tokens = prepare(policy, settings, folder, None, TABLE, STATS["action"], loader().prompt_ids())
    assert tokens.first == 400 and policy.config.language == language
    for name in ("language.embed.weight", "language.head.weight"):
        same = (policy.get_parameter(name) == before[name]).all(1)
        assert same[:400].all() and same[tokens.end + 1 :].all() and not same[400 : tokens.end + 1].any()
    assert policy.language.head.weight.requires_grad and policy.language.norm.weight.requires_grad


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (
            5,
            r"--fast-ids: expected room for 65 ids that no prompt uses, got 5 \.\.\. 69 and the ids \[5, 6",
        ),
        (460, r"got 460 \.\.\. 524 and a vocabulary of 500; drop it to append them"),
        (-3, r"got -3 \.\.\. 61 and"),
    ],
)
def test_a_block_that_is_taken_or_too_far_up_is_refused(folder, first, said):
    policy = Policy(replace(SMOLVLA, language=replace(SMOLVLA.language, vocabulary=500)), STATS)
    settings = replace(SETTINGS, losses=replace(SETTINGS.losses, fast_ids=first))
    with pytest.raises(ValueError, match=said):
        prepare(policy, settings, folder, None, TABLE, STATS["action"], loader().prompt_ids())


def test_a_tokenizer_of_another_chunk_length_is_refused(tmp_path):
    replace(fitted(), horizon=12).save(tmp_path)
    with pytest.raises(ValueError, match="time_horizon: expected 8, the policy's, got 12"):
        build("conv", tmp_path)
