"""What a training run consists of: sizes, budget, optimiser. Presets (training/presets) fill these in."""

from dataclasses import dataclass, field
from typing import Literal

from recap_model.policy.config import ExpertConfig, LanguageConfig, VisionConfig
from training.optim import OptimConfig

# auto: bf16 for the image tower where that is faster, fp32 for the rest. bf16: the whole step under autocast
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class FitSettings:
    """steps: optimiser steps, and so is every other count of steps. batch_size: rows of a micro-batch, over all
    processes. accumulate: micro-batches of an optimiser step. save_every: steps between resumable states. tracker:
    "none", "tensorboard" or "wandb".

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
    accumulate: int = 1
    precision: Precision = "auto"

    @property
    def rows_per_step(self) -> int:
        """Frames that an optimiser step learns from."""
        return self.batch_size * self.accumulate


@dataclass(frozen=True)
class ActionGroup:
    """Dimensions start ... stop - 1 of the action, which the column `loss_mask_<name>` switches on and off by frame."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class LossSettings:
    """What a policy is trained on beside flow matching (`training.policy_loss`).

    fast_weight: weight of the cross entropy of FAST action tokens, where there are any. fast_ids: vocabulary id of the
    first of them, None = appended to the vocabulary. insulate: the action expert's loss stops at the keys and values
    of the prefix. action_groups: dimensions whose loss the data may switch off.
    """

    fast_weight: float = 1.0
    fast_ids: int | None = None
    insulate: bool = False
    action_groups: tuple[ActionGroup, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.fast_weight < float("inf"):
            raise ValueError(f"fast_weight: expected a positive weight, got {self.fast_weight}; drop --fast for none")


@dataclass(frozen=True)
class PolicySettings:
    """draws: (time, noise) pairs per encoded observation; the prefix is the costly part and is computed once for all.

    dropout: share of samples trained without the advantage clause. shift: image augmentation [px].
    state_width, action_width: what the vectors are padded to inside the model, None = not at all. train: "no-vision"
    leaves the image tower as it is (a third faster), "expert" the language model too, and trains action expert and
    the state's projection. positive_share: share of positive frames in every batch of the mode "recap"; None = as in
    the data. cotrain_share: share of frames of demonstrations in every batch; None = as in the data. names_in_prompt:
    the prompt names the entries of state and action (`recap_model.conditioning.with_names`). new_robot: the checkpoint
    that training starts from is given the robot of the data (`training.start`).
    max_delay: most actions at a chunk's start that a sample may be given instead of learning them, as a robot gives
    them that acts while it waits (arXiv 2512.05964); None = as the checkpoint that training starts from, 0 without one.
    lora: rank of the low-rank adapters that train in place of the weights (`training.lora`), None = the weights train.
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
    cotrain_share: float | None = None
    names_in_prompt: bool = False
    new_robot: bool = False
    losses: LossSettings = LossSettings()
    lora: int | None = None
    max_delay: int | None = None


@dataclass(frozen=True)
class CriticSettings:
    """target: "two_hot" or "hl_gauss" (with sigma in bins). held_out: share of episodes kept from training for the
    validation report, when there are no folds.

    use_state: False trains a critic that is not shown the robot's state. state_noise: in standard deviations of the
    state. state_dropout: share of samples whose state is replaced by its mean, drawn per sample, so that the images
    have to do. end_weight: weight in the loss of frames whose return is above end_threshold; the others weigh 1.
    freeze: what keeps the weights of --init, see `recap_model.critic.freeze`.
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
    use_state: bool = True
    state_dropout: float = 0.0
    end_weight: float = 1.0
    end_threshold: float = -0.1
    freeze: Literal["none", "vision", "all"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.state_dropout <= 1:
            raise ValueError(f"state_dropout: expected a share in [0, 1], got {self.state_dropout}")
        if not 0 < self.end_weight < float("inf"):
            raise ValueError(f"end_weight: expected a positive weight, got {self.end_weight}")
        if not -1 <= self.end_threshold <= 0:
            raise ValueError(f"end_threshold: expected a return in [-1, 0], got {self.end_threshold}")
        if not self.use_state and self.state_dropout:
            raise ValueError(
                f"state_dropout: expected 0 for a critic without state, got {self.state_dropout}; drop one of the two"
            )
