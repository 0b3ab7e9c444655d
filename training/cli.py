"""`recap train policy` and `recap train critic`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from recap_model.manifest import Manifest
from training import presets


@dataclass(frozen=True)
class Overrides:
    """Settings that replace the preset's."""

    preset: str = "tiny"
    """Sizes and budget: debug, tiny, smolvla_debug or smolvla_base."""
    steps: int | None = None
    """Optimiser steps."""
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 0
    save_every: int | None = None
    """Steps between resumable states in `<out>.work`."""
    device: str = "auto"
    """auto takes a GPU if torch sees one; else cpu, cuda, cuda:1, ..."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"

    def apply(self, settings: Any) -> Any:
        """`settings` (PolicySettings or CriticSettings) with the given fields replaced."""
        names = ("steps", "batch_size", "save_every")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        fit = replace(settings.fit, seed=self.seed, tracker=self.tracker, device=self.device, **given)
        if self.lr is not None:
            fit = replace(fit, optim=replace(fit.optim, lr=self.lr))
        return replace(settings, fit=fit)


@dataclass(frozen=True)
class TrainPolicy:
    """Train a policy. Run the same command again after an interruption: it resumes."""

    dataset: Path
    out: Path
    """Checkpoint folder to publish."""
    mode: Literal["imitation", "recap", "filtered"] = "recap"
    """recap: advantage-conditioned by --labels. imitation: every frame counts as positive. filtered: only the positive
    frames of --labels (a control)."""
    labels: Path | None = None
    """Advantage labels (`recap label`), for --mode recap and filtered."""
    init: Path | None = None
    """Checkpoint to start from; its sizes, vocabulary and normalisation are kept."""
    dropout: float | None = None
    """Share of samples without the advantage clause."""
    train: Literal["all", "no-vision", "expert"] | None = None
    """What gets gradients: everything, all but the image tower, or the action expert and the state's projection."""
    positive_share: float | None = None
    """Share of positive frames in every batch of --mode recap. Default: as in the data."""
    overrides: tyro.conf.OmitArgPrefixes[Overrides] = Overrides()


@dataclass(frozen=True)
class TrainCritic:
    """Train a distributional critic and write a value for every frame."""

    dataset: Path
    returns: Path
    """Folder of `recap returns`."""
    out: Path
    """Checkpoint folder to publish."""
    values_out: Path
    """Folder for the values of all frames, read by `recap label`."""
    folds: int = 1
    """K > 1: values come from critics that have not seen the episode (K further trainings)."""
    init: Path | None = None
    overrides: tyro.conf.OmitArgPrefixes[Overrides] = Overrides()


def policy(argv: list[str]) -> int:
    """Train a policy and publish its checkpoint."""
    args = tyro.cli(TrainPolicy, args=argv, prog="recap train policy", description=TrainPolicy.__doc__)
    from training.policy import train_policy

    settings = args.overrides.apply(presets.load(args.overrides.preset).policy())
    if args.dropout is not None:
        settings = replace(settings, dropout=args.dropout)
    if args.train is not None:
        settings = replace(settings, train=args.train)
    if args.positive_share is not None:
        settings = replace(settings, positive_share=args.positive_share)
    if args.overrides.preset == "smolvla_base" and args.init is None:
        print(
            "smolvla_base: no --init, so it starts from random weights and will need far more than one robot's data; "
            "`recap import-lerobot lerobot/smolvla_base` makes a pretrained checkpoint to start from"
        )
    _report(args.out, train_policy(settings, args.dataset, args.labels, args.init, args.out, args.mode))
    return 0


def critic(argv: list[str]) -> int:
    """Train a critic, publish its checkpoint and the values of all frames."""
    args = tyro.cli(TrainCritic, args=argv, prog="recap train critic", description=TrainCritic.__doc__)
    from training.critic import train_critic

    settings = args.overrides.apply(presets.load(args.overrides.preset).critic())
    _report(
        args.out,
        train_critic(settings, args.dataset, args.returns, args.init, args.out, args.folds, args.values_out),
    )
    return 0


def _report(out: Path, manifest: Manifest) -> None:
    print(f"{out}: {manifest.kind} {manifest.hash[:12]}")
    for key, value in manifest.metrics.items():
        print(f"  {key}: {value:.4f}" if isinstance(value, float) else f"  {key}: {value}")
