"""What a policy is trained on: flow matching of actions and, for the backbone, cross entropy of FAST action tokens.

pi*0.6 equation 4 with one stream of actions for each: the expert never sees action tokens, which stand behind the
prefix and see it, and each other causally. With insulation (Knowledge Insulation, arXiv 2505.23705, equations 5 and 6)
the flow loss ends at the keys and values of the prefix: it trains the expert, its own projections of these keys
included; vision tower, language model and state projection learn from the action tokens alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from recap_model.policy import flow
from recap_model.policy.config import PolicyConfig
from recap_model.policy.language import prefix_mask
from recap_model.policy.model import Policy, Prefix
from training.action_tokens import ActionTokens
from training.loader import Batch
from training.loop import autocast_vision, placer
from training.settings import Precision

Put = Callable[[NDArray[Any]], Tensor]


@dataclass(frozen=True)
class Terms:
    """tokens: the action tokens to learn, with `fast_weight`; None = flow matching alone. insulate: see above."""

    tokens: ActionTokens | None = None
    fast_weight: float = 1.0
    insulate: bool = False


FLOW = Terms()


def policy_loss(
    policy: Policy,
    batch: Batch,
    draws: int,
    generator: torch.Generator,
    precision: Precision = "auto",
    terms: Terms = FLOW,
) -> Tensor:
    """The batch's share of its step's loss: flow matching, the mean over all learned entries of the step's actions, and
    the weighted cross entropy of the action tokens. Each encoded observation is used with `draws` pairs of noise and
    time."""
    put = placer(policy)
    with autocast_vision(policy, precision):
        seen = policy.see(put(batch.images))
    prefix, cross_entropy = read(policy, seen.float(), batch, terms)
    loss = flow_loss(policy, prefix, batch, draws, generator)
    return loss if cross_entropy is None else loss + terms.fast_weight * cross_entropy


def flow_loss(policy: Policy, prefix: Prefix, batch: Batch, draws: int, generator: torch.Generator) -> Tensor:
    """The batch's share of the flow-matching loss."""
    put = placer(policy)
    prefix = prefix.repeat(draws)
    actions = policy.normalize_actions(put(batch.actions)).repeat_interleave(draws, 0)
    # drawn on the CPU for the whole step: the same seed is the same run on any device and however the step is divided
    total, rows = batch.total * draws, slice(batch.rows.start * draws, batch.rows.stop * draws)
    noise = torch.randn((total, *actions.shape[1:]), generator=generator)[rows].to(actions.device)
    time = flow.sample_time(total, generator)[rows].to(actions.device)
    given = given_rows(total, policy.config, generator)
    if given is not None:
        given = given[rows].to(actions.device)
        time = torch.where(given, 0.0, time[:, None])
    noisy, target = flow.interpolate(actions, noise, time)
    own = slice(policy.config.action_dim)  # what pads the action to the model's width is nothing to learn
    velocity = policy.velocity(noisy, time, prefix)[..., own].float()  # a sum of many bf16 numbers would be coarse
    if given is not None:  # no error, rather than no part of the mean: parts of a step then add up to it
        velocity = torch.where(given[:, :, None], target[..., own], velocity)
    if batch.action_mask is None:
        valid = put(batch.valid).repeat_interleave(draws, 0)
        return flow.loss(velocity, target[..., own], valid) * batch.valid_share()
    mask = put(batch.action_mask).repeat_interleave(draws, 0)
    return masked_mean((velocity - target[..., own]) ** 2, mask) * batch.valid_share()


def given_rows(total: int, config: PolicyConfig, generator: torch.Generator) -> Tensor | None:
    """bool [total, chunk]: actions that a sample is given as they are and does not learn, the first d of its chunk with
    d uniform in 0 ... max_delay (arXiv 2512.05964, section 3); None for a policy that is trained without."""
    if not config.max_delay:
        return None
    delay = torch.randint(config.max_delay + 1, (total, 1), generator=generator)
    return torch.arange(config.chunk) < delay


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` (bool, same shape) is True; 0 where it is nowhere."""
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp(min=1)


def read(policy: Policy, seen: Tensor, batch: Batch, terms: Terms = FLOW) -> tuple[Prefix, Tensor | None]:
    """(what the expert reads of the batch, the batch's share of the action tokens' cross entropy or None).

    seen: image tokens. One pass: the prefix cannot see the action tokens, so its keys are those of inference.
    """
    put = placer(policy)
    cameras = None if batch.camera_mask is None else put(batch.camera_mask)
    x, pad = policy.embed_prefix(seen, put(batch.state), put(batch.tokens), put(batch.token_mask), cameras)
    length, depth = x.shape[1], policy.expert.depth
    mask, positions = prefix_mask(pad)
    cross_entropy = None
    if terms.tokens is None:
        _, cache = policy.language(x, mask, positions, stop=depth)
    else:
        ids, learned = (put(array) for array in terms.tokens(batch))
        behind = policy.language.embed_text(ids[:, :-1])
        hidden, cache = policy.language(torch.cat([x, behind], dim=1), *extend(mask, positions, pad, behind.shape[1]))
        # the state, last of the prefix, says the first token; the last one says the end
        cross_entropy = token_loss(policy, hidden[:, length - 1 :], ids, learned) / batch.total
    keys = [(k[:, :length], v[:, :length]) for k, v in cache]
    if terms.insulate:  # before the expert's own projections of the keys, which are the expert's to learn
        keys = [(k.detach(), v.detach()) for k, v in keys]
    return Prefix(policy.expert.prefix_keys(keys), pad), cross_entropy


def extend(mask: Tensor, positions: Tensor, pad: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mask [B, P + count, P + count] and positions [B, P + count] of a prefix with `count` action tokens behind it:
    these see the real tokens of the prefix and, causally, each other; nothing sees them."""
    batch, length = pad.shape
    order = torch.arange(count, device=pad.device)
    causal = (order[None, :] <= order[:, None]).expand(batch, -1, -1)
    above = torch.cat([mask, mask.new_zeros(batch, length, count)], dim=2)
    below = torch.cat([pad[:, None, :].expand(-1, count, -1), causal], dim=2)
    return torch.cat([above, below], dim=1), torch.cat([positions, pad.long().sum(1, keepdim=True) + order], dim=1)


def token_loss(policy: Policy, hidden: Tensor, ids: Tensor, learned: Tensor) -> Tensor:
    """Cross entropy of ids [B, L] given the hidden states [B, L, width] before each: the mean over a sample's tokens
    (where `learned`), summed over samples."""
    # only positions that count reach the head: a large vocabulary is what takes memory here
    losses = F.cross_entropy(policy.language.logits(hidden[learned]).float(), ids[learned], reduction="none")
    counts = learned.sum(1, keepdim=True).clamp(min=1).expand_as(learned)
    return (losses / counts[learned]).sum()
