"""What a training run consists of: sizes, budget, optimiser. Presets (training/presets) fill these in."""

from dataclasses import dataclass, field
from typing import Literal

from recap_model.policy.config import ExpertConfig, LanguageConfig, VisionConfig
from training.optim import OptimConfig


@dataclass(frozen=True)
class FitSettings:
    """steps: optimiser steps. save_every: steps between resumable states. tracker: "none", "tensorboard" or "wandb".

    device: "auto" takes a GPU if torch sees one. Threads: 0 leaves the number to torch.
    """

    steps: int
    batch_size: int = 64
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    tracker: str = "none"
    threads: int = 0
    device: str = "auto"
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class PolicySettings:
    """draws: (time, noise) pairs per encoded observation; the prefix is the costly part and is computed once for all.

    dropout: share of samples trained without the advantage clause. shift: image augmentation [px].
    state_width, action_width: what the vectors are padded to inside the model, None = not at all. train: "no-vision"
    leaves the image tower as it is (a third faster), "expert" the language model too, and trains action expert and
    the state's projection. positive_share: share of positive frames in every batch of the mode "recap"; None = as in
    the data.
    """

    vision: VisionConfig
    language: LanguageConfig
    expert: ExpertConfig
    fit: FitSettings
    chunk: int = 8
    max_tokens: int = 16
    denoise_steps: int = 8
    draws: int = 2
    dropout: float = 0.3
    shift: int = 2
    state_width: int | None = None
    action_width: int | None = None
    train: Literal["all", "no-vision", "expert"] = "all"
    positive_share: float | None = None


@dataclass(frozen=True)
class CriticSettings:
    """target: "two_hot" or "hl_gauss" (with sigma in bins). state_noise: in standard deviations of the state.

    held_out: share of episodes kept from training for the validation report, when there are no folds.
    """

    vision: VisionConfig
    language: LanguageConfig
    fit: FitSettings
    max_tokens: int = 16
    bins: int = 201
    dropout: float = 0.2
    target: str = "hl_gauss"
    sigma_bins: float = 3.0
    state_noise: float = 0.05
    shift: int = 2
    held_out: float = 0.15
