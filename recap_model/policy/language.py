"""The prefix transformer: image tokens, prompt and state in, keys and values of every layer out.

Layout of SmolLM2 as LeRobot's SmolVLA uses it: RMSNorm before each block, rotary embedding with wavelength 10,000 in
fp32, grouped-query attention, gated SiLU. Images and text see each other; the state sees both and is seen by neither.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recap_model.policy.config import LanguageConfig

ROPE_WAVELENGTH = 10_000.0


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate x [B, L, heads, head_dim] by positions [B, L] (LeRobot's `apply_rope`: halves, not pairs)."""
    half = x.shape[-1] // 2
    exponent = torch.arange(half, dtype=torch.float32, device=x.device) * (2.0 / x.shape[-1])
    radians = positions[..., None].float() / ROPE_WAVELENGTH**exponent
    sin, cos = radians.sin()[:, :, None, :], radians.cos()[:, :, None, :]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, Lq, H, D]; k, v [B, Lk, G, D], G divides H; mask bool [B, Lq, Lk], True where visible -> [B, Lq, H*D]."""
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


class GatedMLP(nn.Module):
    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, intermediate, bias=False)
        self.up = nn.Linear(width, intermediate, bias=False)
        self.down = nn.Linear(intermediate, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Projections, norms and MLP of one transformer layer; the attention itself is `attend`, called by the owner.

    kv_width: width of what keys and values are projected from, when not the layer's own stream.
    """

    def __init__(self, width: int, intermediate: int, config: LanguageConfig, kv_width: int | None = None) -> None:
        super().__init__()
        kv_in, kv_out = kv_width or width, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.input_norm = nn.RMSNorm(width, eps=1e-5)
        self.q = nn.Linear(width, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(kv_in, kv_out, bias=False)
        self.v = nn.Linear(kv_in, kv_out, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, width, bias=False)
        self.post_norm = nn.RMSNorm(width, eps=1e-5)
        self.mlp = GatedMLP(width, intermediate)

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, heads*head_dim] -> [B, L, heads, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual, then the MLP block."""
        x = x + self.o(attended)
        return x + self.mlp(self.post_norm(x))


KeyValues = list[tuple[Tensor, Tensor]]


class LanguageModel(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config.width, config.intermediate, config) for _ in range(config.layers))
        if config.head:
            self.norm = nn.RMSNorm(config.width, eps=1e-5)
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)
            for module in (self.norm, self.head):
                module.requires_grad_(False)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states of `forward` [B, L, width] -> what comes next [B, L, vocabulary]. Needs `config.head`."""
        return self.head(self.norm(x))

    def learn_tokens(self, first: int, count: int, generator: torch.Generator) -> None:
        """Give ids first ... first + count - 1 fresh embeddings, and make the head train (it is frozen at first).

        The vocabulary grows where they lie behind it; a head is added where there is none; all other rows keep their
        values. A fresh embedding is as long as the others are on average, so that attention notices it.
        """
        old = self.embed.weight.detach()
        size = max(self.config.vocabulary, 8 * math.ceil((first + count) / 8))  # as matrix units like it
        embed = torch.empty(size, self.config.width)
        torch.nn.init.normal_(embed, std=0.02, generator=generator)
        head = torch.empty(size, self.config.width)
        torch.nn.init.normal_(head, std=0.02, generator=generator)
        length = old.norm(dim=1).mean().cpu()
        embed = embed / embed.norm(dim=1, keepdim=True) * length
        index = torch.arange(len(old))
        fresh = (index >= first) & (index < first + count)
        embed[: len(old)] = torch.where(fresh[:, None], embed[: len(old)], old.cpu())
        if self.config.head:
            head[: len(old)] = torch.where(fresh[:, None], head[: len(old)], self.head.weight.detach().cpu())
        else:
            self.norm = nn.RMSNorm(self.config.width, eps=1e-5, device=old.device)
        trained = self.embed.weight.requires_grad
        self.embed = nn.Embedding.from_pretrained(embed.to(old.device), freeze=not trained)
        self.head = nn.Linear(self.config.width, size, bias=False, device=old.device)
        self.head.weight = nn.Parameter(head.to(old.device))
        self.config = replace(self.config, vocabulary=size, head=True)
        self.train_head()

    def train_head(self) -> None:
        """Let the final norm and the head train: only action tokens read them."""
        for module in (self.norm, self.head):
            module.requires_grad_(True)

    def embed_text(self, tokens: Tensor) -> Tensor:
        """int [B, L] -> [B, L, width], scaled by sqrt(width) as SmolVLA does."""
        return self.embed(tokens.long()) * self.config.width**0.5

    def forward(
        self, x: Tensor, mask: Tensor, positions: Tensor, *, stop: int | None = None
    ) -> tuple[Tensor, KeyValues]:
        """x [B, P, width], mask [B, P, P], positions [B, P] -> (hidden states, keys and values of each layer).

        Keys and values are [B, P, kv_heads, head_dim], rotated. With `stop`, layer stop - 1 is the last one and ends at
        its keys and values: nothing behind them reaches the action expert.
        """
        cache: KeyValues = []
        for layer in self.layers[:stop]:
            h = layer.input_norm(x)
            k, v = rope(layer.heads(layer.k(h)), positions), layer.heads(layer.v(h))
            cache.append((k, v))
            if len(cache) != stop:
                q = rope(layer.heads(layer.q(h)), positions)
                x = layer.finish(x, attend(q, k, v, mask))
        return x, cache


def prefix_mask(pad: Tensor) -> tuple[Tensor, Tensor]:
    """pad bool [B, P] (True where real; the state is the last position) -> (mask [B, P, P], positions int64 [B, P]).

    Everything sees everything before the state; only the state sees the state.
    """
    length = pad.shape[1]
    is_state = torch.arange(length, device=pad.device) == length - 1
    visible = pad[:, None, :] & pad[:, :, None] & (~is_state[None, None, :] | is_state[None, :, None])
    return visible, pad.long().cumsum(1) - 1
