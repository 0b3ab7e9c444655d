"""The action expert: one flow-matching velocity, given noisy actions, time and the prefix's keys and values."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recap_model.policy.config import ExpertConfig, LanguageConfig, expert_plan
from recap_model.policy.language import KeyValues, Layer, attend, rope


def time_embedding(time: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """Sine-cosine embedding of time [...] in [0, 1] -> [..., width] (LeRobot's `create_sinusoidal_pos_embedding`)."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64).to(time.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = (1.0 / period * 2 * math.pi) * time[..., None]  # float64: the fastest has 250 periods in [0, 1]
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(torch.float32)


class ActionExpert(nn.Module):
    def __init__(self, config: ExpertConfig, language: LanguageConfig, action_dim: int) -> None:
        super().__init__()
        self.config = config
        width, kv_width = config.width, language.kv_heads * language.head_dim
        self.action_in = nn.Linear(action_dim, width)
        self.time_in = nn.Linear(2 * width, width)
        self.time_out = nn.Linear(width, width)
        self.plan = expert_plan(language, config)
        self.layers = nn.ModuleList(
            Layer(width, config.intermediate, language, kv_width=None if step.joint else kv_width) for step in self.plan
        )
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.action_out = nn.Linear(width, action_dim)

    @property
    def depth(self) -> int:
        """Language layers that the expert reads from: those behind them need not run."""
        return self.plan[-1].at + 1

    def prefix_keys(self, cache: KeyValues) -> KeyValues:
        """Keys and values each layer reads from the prefix. They do not depend on time: computed once per chunk."""
        keys: KeyValues = []
        for layer, step in zip(self.layers, self.plan, strict=True):
            k, v = cache[step.at]
            if not step.joint:
                k, v = layer.heads(layer.k(k.flatten(2))), layer.heads(layer.v(v.flatten(2)))
            keys.append((k, v))
        return keys

    def forward(self, actions: Tensor, time: Tensor, keys: KeyValues, pad: Tensor) -> Tensor:
        """actions [B, T, A] at noise level time [B] or [B, T] (1 noise, 0 clean), keys from `prefix_keys`, pad bool
        [B, P].

        Returns the velocity d actions / d time [B, T, A].
        """
        length = actions.shape[1]
        embedded = self.action_in(actions)
        when = time_embedding(time, self.config.width, self.config.min_period, self.config.max_period)
        when = when if time.ndim == 2 else when[:, None, :].expand(-1, length, -1)
        x = torch.cat([embedded, when], dim=-1)
        x = self.time_out(F.silu(self.time_in(x)))
        order = torch.arange(length, device=actions.device)
        to_prefix = pad[:, None, :].expand(-1, length, -1)
        causal = (order[None, :] <= order[:, None])[None].expand(actions.shape[0], -1, -1)
        positions = order[None, :].expand(actions.shape[0], -1)
        after_prefix = positions + pad.long().sum(1, keepdim=True)
        for layer, step, (k, v) in zip(self.layers, self.plan, keys, strict=True):
            h = layer.input_norm(x)
            q = layer.heads(layer.q(h))
            if step.joint:
                k = torch.cat([k, rope(layer.heads(layer.k(h)), after_prefix)], dim=1)
                v = torch.cat([v, layer.heads(layer.v(h))], dim=1)
                attended = attend(rope(q, after_prefix), k, v, torch.cat([to_prefix, causal], dim=2))
            else:
                attended = attend(rope(q, positions), k, v, to_prefix)
            x = layer.finish(x, attended)
        return self.action_out(self.norm(x))
