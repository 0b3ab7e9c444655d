"""What a critic is trained towards: target distributions, the weight of frames, and what is hidden from it."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from recap_model.critic.model import Critic
from recap_model.returns import hl_gauss, two_hot
from training.loader import Batch
from training.loop import autocast_vision, placer
from training.settings import CriticSettings


def critic_loss(critic: Critic, batch: Batch, settings: CriticSettings, generator: torch.Generator) -> Tensor:
    """Cross entropy between the critic's distribution and the target's: the batch's share of the weighted mean over
    its step, scalar."""
    put = placer(critic)
    state = disturb_state(critic, put(batch.state), settings, generator, batch.rows, batch.total)
    with autocast_vision(critic, settings.fit.precision):
        seen = critic.see(put(batch.images))
    logits = critic.read(seen.float(), state, put(batch.tokens), put(batch.token_mask))
    losses = F.cross_entropy(logits.float(), put(target_encoder(settings)(batch.target)), reduction="none")
    if settings.end_weight == 1.0:
        return losses.mean() * batch.share()
    weight = put(frame_weights(batch.target, settings))
    return (losses * weight).sum() / float(frame_weights(batch.all_targets, settings).sum())


def disturb_state(
    critic: Critic,
    state: Tensor,
    settings: CriticSettings,
    generator: torch.Generator,
    rows: slice = slice(None),
    total: int | None = None,
) -> Tensor:
    """state [B, S] (physical units) with noise; `state_dropout` of the samples get the mean state, which the critic
    reads as zeros. Everything is drawn on the CPU: the same seed is the same run on every device.

    rows, total: the states are those rows of a step of `total`, whose draws they get.
    """
    total = len(state) if total is None else total
    noise = torch.randn((total, state.shape[1]), generator=generator)[rows] * settings.state_noise
    state = state + noise.to(state.device) * critic.state_scale
    if settings.state_dropout:
        dropped = torch.rand((total, 1), generator=generator)[rows] < settings.state_dropout
        state = torch.where(dropped.to(state.device), critic.state_shift, state)
    return state


def frame_weights(returns: NDArray[np.float32], settings: CriticSettings) -> NDArray[np.float32]:
    """float32 [B]: `end_weight` where the return is above `end_threshold`, else 1."""
    return np.where(returns > settings.end_threshold, settings.end_weight, 1.0).astype(np.float32)


def target_encoder(settings: CriticSettings) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Returns [B] in [-1, 0] -> target distributions float32 [B, bins]."""
    if settings.target == "two_hot":
        return lambda r: two_hot(r.astype(np.float64), settings.bins, -1.0, 0.0).astype(np.float32)
    if settings.target == "hl_gauss":
        return lambda r: hl_gauss(r.astype(np.float64), settings.bins, -1.0, 0.0, settings.sigma_bins).astype(
            np.float32
        )
    raise ValueError(f"critic target: expected two_hot or hl_gauss, got {settings.target!r}")
