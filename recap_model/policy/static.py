"""The policy as one static inference graph: what every engine runs and every exporter writes.

The same numbers as `Policy.sample_actions`, computed with nothing twice: the prefix once, cross-attention projections
of the prefix outside the denoising loop, time embeddings and rotary tables as constants, the last language layer only
as far as the expert reads it, all cameras in one pass, guidance as one batch that shares the image tokens, real-time
chunking in closed form. No shape and no branch depends on data.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recap_model import rtc
from recap_model.guidance import combine
from recap_model.policy import flow
from recap_model.policy.expert import time_embedding
from recap_model.policy.model import Policy, pair
from recap_model.policy.scaling import surround
from recap_model.policy.siglip import SiglipTower
from recap_model.policy.static_parts import (
    MASKED,
    Attention,
    Dense,
    StaticLayer,
    StaticSiglip,
    attend,
    rms_norm,
    rope_table,
    rotate,
)
from recap_model.policy.vision import encode_cameras

OBSERVATION = ("images", "state", "tokens", "token_mask")
UNCONDITIONAL = ("unconditional_tokens", "unconditional_mask", "beta")
CHUNKING = ("previous", "prefix_weights", "guidance_weights")


@dataclass(frozen=True)
class GraphOptions:
    """guided: classifier-free guidance, beta per sample. rtc: real-time chunking inputs. dtype: of matrix products.

    attention: "matmul" is written out (TensorRT, other runtimes), "sdpa" takes torch's fused kernels (torch engine),
    "onnxruntime" exports the image tower with that runtime's tiled attention.
    """

    guided: bool = False
    rtc: bool = False
    dtype: torch.dtype = torch.float32
    attention: Attention = "matmul"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        return (*OBSERVATION, *(UNCONDITIONAL if self.guided else ()), "noise", *(CHUNKING if self.rtc else ()))


@dataclass(frozen=True)
class StaticPrefix:
    """What the denoising steps read of an observation.

    keys: keys and values of each expert layer [B, kv_heads, P, head_dim]; hidden: bias fp32 [B, 1, 1, P], 0 or MASKED;
    rope: rotation of the actions behind the prefix fp32 [B, T, 2, head_dim].
    """

    keys: list[tuple[Tensor, Tensor]]
    hidden: Tensor
    rope: Tensor

    def flat(self) -> tuple[Tensor, ...]:
        """All tensors, for a graph that ends here and another that begins here."""
        return (*(tensor for pair_ in self.keys for tensor in pair_), self.hidden, self.rope)

    @staticmethod
    def of(flat: tuple[Tensor, ...]) -> "StaticPrefix":
        """Inverse of `flat`."""
        *keys, hidden, rope = flat
        return StaticPrefix(list(zip(keys[::2], keys[1::2], strict=True)), hidden, rope)


class StaticPolicy(nn.Module):
    """images uint8 [B, K, H, W, 3]; state [B, S] in physical units; tokens int32 [B, L], token_mask bool [B, L]; noise
    [B, T, padded]; beta [B]; previous [B, T, A] in physical units, prefix_weights [B, T], guidance_weights [B, steps]
    (`recap_model.rtc`) -> actions [B, T, A] in physical units."""

    special: Tensor | None
    embedding: Tensor
    rope: Tensor
    causal: Tensor
    time_bias: Tensor
    clean_bias: Tensor

    def __init__(self, policy: Policy, options: GraphOptions) -> None:
        super().__init__()
        self.options, self.config = options, policy.config
        dtype, how = options.dtype, options.attention
        tower, expert, language = policy.vision, policy.expert, policy.language
        self.tower = StaticSiglip(tower, dtype, how) if isinstance(tower, SiglipTower) else tower
        self.scaling, self.state_in = policy.scaling, policy.state_in
        special = policy.special_tokens()
        self.register_buffer("special", None if special is None else special.detach())
        self.layers = nn.ModuleList(
            StaticLayer(layer, dtype, last=i + 1 == expert.depth)  # type: ignore[arg-type]
            for i, layer in enumerate(language.layers[: expert.depth])
        )
        self.plan = expert.plan
        self.expert = nn.ModuleList(
            StaticLayer(layer, dtype, joint=step.joint)  # type: ignore[arg-type]
            for layer, step in zip(expert.layers, expert.plan, strict=True)
        )
        self.norm = expert.norm
        self.action_out = Dense(expert.action_out.weight, expert.action_out.bias, torch.float32)
        self.time_out = Dense(expert.time_out.weight, expert.time_out.bias, dtype)
        self.register_buffer("embedding", (language.embed.weight * self.config.language.width**0.5).detach().to(dtype))
        self._fold_time(policy)
        longest = self.config.prefix_length + self.config.chunk
        self.register_buffer("rope", rope_table(longest, self.config.language.head_dim))
        order = torch.arange(self.config.chunk)
        later = torch.where(order[None, :] <= order[:, None], 0.0, MASKED)
        self.register_buffer("causal", later[None, None])

    def _fold_time(self, policy: Policy) -> None:
        """silu(time_in([action_in(x), time])) = silu(M x + bias of the step): the times are known beforehand."""
        expert, config = policy.expert, policy.config.expert
        times = torch.tensor((*flow.times(self.config.denoise_steps), 0.0), dtype=torch.float32)
        with torch.no_grad():
            when = time_embedding(times, config.width, config.min_period, config.max_period)
            of_action, of_time = expert.time_in.weight.split(config.width, dim=1)
            self.action_in = Dense(of_action @ expert.action_in.weight, None, torch.float32)
            bias = expert.time_in.bias + of_action @ expert.action_in.bias + when @ of_time.T
        self.register_buffer("time_bias", bias[:-1])
        self.register_buffer("clean_bias", bias[-1])

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.options.inputs, inputs, strict=True))
        prefix, x = self.prepare(given), given["noise"].float()
        previous = self.scaling.actions(given["previous"]) if self.options.rtc else None
        for i, time in enumerate(flow.times(self.config.denoise_steps)):
            extra: dict[str, Any] = {"beta": given["beta"]} if self.options.guided else {}
            if previous is not None:
                guidance = given["guidance_weights"][:, i]
                extra |= {"previous": previous, "weights": given["prefix_weights"], "guidance": guidance, "time": time}
            x = self.step(x, self.time_bias[i], prefix, **extra)
        return self.scaling.physical(x)

    def prepare(self, given: dict[str, Tensor]) -> StaticPrefix:
        """Everything before the first denoising step."""
        seen = surround(encode_cameras(self.tower, given["images"]), self.special, self.config)
        state, tokens, mask = given["state"], given["tokens"], given["token_mask"]
        if self.options.guided:
            seen, state = pair(seen, seen), pair(state, state)
            tokens, mask = pair(tokens, given["unconditional_tokens"]), pair(mask, given["unconditional_mask"])
        return self.read(seen, state, tokens, mask)

    def step(
        self,
        x: Tensor,
        time_bias: Tensor,
        prefix: StaticPrefix,
        *,
        beta: Tensor | None = None,
        previous: Tensor | None = None,
        weights: Tensor | None = None,
        guidance: Tensor | None = None,
        time: Any = 1.0,
    ) -> Tensor:
        """One Euler step. x, previous [B, T, padded]; time_bias [width]; beta, guidance [B]; weights [B, T].

        A policy that was trained with delays is told the rows of weight 1 as they are, at noise level 0: the others
        continue them. They come out unchanged.
        """
        held = None
        if previous is not None and weights is not None and self.config.max_delay:
            held = weights[:, :, None] >= 1.0
            x = torch.where(held, previous, x)
            time_bias = torch.where(held, self.clean_bias, time_bias)
        v = self.velocity(x, time_bias, prefix)
        if beta is not None:
            conditional, unconditional = v.unflatten(0, (2, -1)).unbind(0)
            v = combine(conditional, unconditional, beta[:, None, None])
        if previous is not None and weights is not None and guidance is not None:
            v = rtc.correct(v, x, time, previous, weights[:, :, None], guidance[:, None, None])
        following = x + v * (-1.0 / self.config.denoise_steps)
        return following if held is None or previous is None else torch.where(held, previous, following)

    def read(self, seen: Tensor, state: Tensor, tokens: Tensor, token_mask: Tensor) -> StaticPrefix:
        """seen [B, I, width]: image tokens with what surrounds them; the rest as for the graph."""
        text = self.embedding[tokens.long()].to(seen.dtype)
        state_token = self.state_in(self.scaling.state(state))[:, None, :]
        x = torch.cat([seen, text, state_token], dim=1)
        one = torch.ones_like(token_mask[:, :1])
        pad = torch.cat([torch.ones_like(seen[:, :, 0], dtype=torch.bool), token_mask, one], dim=1)
        count = pad.to(torch.int64).cumsum(1)
        table = self.rope[count - 1]
        hidden = torch.where(pad, 0.0, MASKED)[:, None, None, :]
        # the state is the last position, seen by itself alone; rows of padding see as text does, and are never seen
        last = torch.arange(x.shape[1], device=x.device) == x.shape[1] - 1
        bias = hidden + torch.where(last[None, :] & ~last[:, None], MASKED, 0.0)[None, None]
        cache: list[tuple[Tensor, Tensor]] = []
        for layer in self.layers:
            heads = layer.heads(x)
            q, k, v = layer.split(heads)
            if layer.last:
                k = rotate(k, table)
            else:
                q, k = rotate(q, table), rotate(k, table)
            k, v = k.to(v.dtype).transpose(1, 2), v.transpose(1, 2)
            cache.append((k, v))
            if not layer.last:
                x = layer.finish(x, attend(q, k, v, bias, self.options.attention))
        order = torch.arange(self.config.chunk, device=x.device)
        return StaticPrefix(self._expert_keys(cache), hidden, self.rope[count[:, -1:] + order])

    def _expert_keys(self, cache: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """What each expert layer reads of the prefix: the same at every step."""
        keys = []
        for layer, step in zip(self.expert, self.plan, strict=True):
            k, v = cache[step.at]
            if not step.joint:
                k, v = (
                    m(x.transpose(1, 2).flatten(2)).unflatten(2, (-1, layer.head_dim)).transpose(1, 2)
                    for m, x in ((layer.k, k), (layer.v, v))
                )
            keys.append((k, v))
        return keys

    def velocity(self, x: Tensor, time_bias: Tensor, prefix: StaticPrefix) -> Tensor:
        """Noisy actions [B, T, padded], what the noise level adds [width] or [B, T, width] -> velocity fp32; rows as in
        the prefix."""
        h = self.time_out(F.silu(self.action_in(x) + time_bias)).float()
        if self.options.guided:
            h = pair(h, h)
        length = self.config.chunk
        own = self.rope[None, :length]
        causal = self.causal.expand(h.shape[0], -1, -1, -1)
        bias = torch.cat([prefix.hidden.expand(-1, -1, length, -1), causal], dim=3)
        for layer, (k, v) in zip(self.expert, prefix.keys, strict=True):
            heads = layer.heads(h)
            if layer.joint:
                q, new_k, new_v = layer.split(heads)
                q, new_k = rotate(q, prefix.rope), rotate(new_k, prefix.rope).to(k.dtype)
                k, v = torch.cat([k, new_k.transpose(1, 2)], dim=2), torch.cat([v, new_v.transpose(1, 2)], dim=2)
                attended = attend(q, k, v, bias, self.options.attention)
            else:
                attended = attend(rotate(heads, own), k, v, prefix.hidden, self.options.attention)
            h = layer.finish(h, attended)
        return self.action_out(rms_norm(h, self.norm))
