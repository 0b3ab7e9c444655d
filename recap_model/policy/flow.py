"""Flow matching as SmolVLA and pi0 have it: time 1 is noise, time 0 is data (pi*0.6 counts the other way round)."""

from collections.abc import Callable

import torch
from torch import Tensor

BETA_A, BETA_B = 1.5, 1.0  # time ~ Beta(1.5, 1): more weight near noise, where the choice of mode is made


def sample_time(count: int, generator: torch.Generator) -> Tensor:
    """[count] times in (0.001, 1), distributed as Beta(1.5, 1) by inversion of its distribution function t**1.5."""
    return 0.999 * torch.rand(count, generator=generator) ** (1.0 / BETA_A) + 0.001


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """actions, noise [B, T, A], time [B] or [B, T] -> (noisy actions, target velocity), both [B, T, A]."""
    t = time[:, None, None] if time.ndim == 1 else time[:, :, None]
    return t * noise + (1 - t) * actions, noise - actions


def loss(velocity: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error over valid actions. velocity, target [B, T, A]; valid bool [B, T] (False past episode end)."""
    weight = valid[:, :, None].to(velocity.dtype)
    return ((velocity - target) ** 2 * weight).sum() / (weight.sum() * velocity.shape[2]).clamp(min=1)


def integrate(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Euler from noise (time 1) to data (time 0) in `steps` equal steps; accumulates in fp32."""
    x = noise.float()
    for time in times(steps):
        x = x + velocity(x, time).float() * (-1.0 / steps)
    return x


def times(steps: int) -> tuple[float, ...]:
    """The noise levels at which `integrate` asks for the velocity: 1, 1 - 1/steps, ..., 1/steps."""
    return tuple(1.0 + i * (-1.0 / steps) for i in range(steps))
