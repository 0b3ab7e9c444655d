"""Optimiser, schedule and the moving average of weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to `final` times the peak rate.

    ema: decay of the moving average that is evaluated and exported (0: the last weights); it warms up at first.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    warmup: int = 100
    final: float = 0.02
    clip: float = 1.0
    ema: float = 0.995


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Weight decay on matrices only."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of optimiser step `step` of `steps`."""
    warmup = min(config.warmup, max(steps // 10, 1))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress)))


class Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in parameters}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        names, values = zip(*((n, p) for n, p in module.named_parameters()), strict=True)
        torch._foreach_lerp_([self.shadow[n] for n in names], [v.detach() for v in values], 1 - decay)
