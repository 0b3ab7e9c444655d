"""`recap train policy` and `recap train critic`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from recap_model.manifest import Manifest
from training import presets
from training.distributed import processes

if TYPE_CHECKING:
    from training.mixture import Mixture
    from training.streaming import Frames


@dataclass(frozen=True)
class Overrides:
    """Settings that replace the preset's."""

    preset: str = "tiny"
    """Sizes and budget: debug, tiny, pretrain_debug, pretrain_tiny, smolvla_debug or smolvla_base."""
    steps: int | None = None
    """Optimiser steps."""
    batch_size: int | None = None
    """Frames of a micro-batch, over all processes."""
    accumulate: int | None = None
    """Micro-batches of an optimiser step: --batch-size 16 --accumulate 4 learns as --batch-size 64 in less memory."""
    precision: Literal["auto", "fp32", "bf16"] | None = None
    """auto: bf16 for the image tower where that is faster, fp32 for the rest. bf16: autocast over the whole step."""
    lr: float | None = None
    seed: int = 0
    save_every: int | None = None
    """Steps between resumable states in `<out>.work`."""
    device: str = "auto"
    """auto takes a GPU if torch sees one; else cpu, cuda, cuda:1, ..."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    frames: Literal["memory", "disk"] = "memory"
    """disk: decoded frames lie in a memory-mapped file, for datasets larger than memory."""
    cache: Path | None = None
    """Folder of that file, for all runs on the dataset. Default: `frames` beside the checkpoint folder."""

    def storage(self, out: Path) -> "Frames":
        """Where decoded frames are kept in a run that publishes `out`."""
        from training.streaming import Frames

        if self.frames == "memory" and self.cache is not None:
            raise ValueError(f"--cache: expected --frames disk, which it is for, got {self.cache} alone")
        return Frames(self.frames, self.cache or out.parent / "frames") if self.frames == "disk" else Frames()

    def apply(self, settings: Any) -> Any:
        """`settings` (PolicySettings or CriticSettings) with the given fields replaced."""
        names = ("steps", "batch_size", "accumulate", "precision", "save_every")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        fit = replace(settings.fit, seed=self.seed, tracker=self.tracker, device=self.device, **given)
        if self.lr is not None:
            fit = replace(fit, optim=replace(fit.optim, lr=self.lr))
        return replace(settings, fit=fit)


@dataclass(frozen=True)
class TrainPolicy:
    """Train a policy. Run the same command again after an interruption: it resumes."""

    out: Path
    """Checkpoint folder to publish."""
    dataset: Path | None = None
    """LeRobot dataset of one robot. Give this or --mixture."""
    mixture: Path | None = None
    """JSON or TOML file that names datasets of several robots with their weights and labels: pre-training."""
    serve: str = ""
    """Name of the dataset of --mixture whose robot the checkpoint serves. Default: the first."""
    names_in_prompt: bool = False
    """The prompt names the entries of state and action behind the task; the services then do the same."""
    mode: Literal["imitation", "recap", "filtered"] = "recap"
    """recap: advantage-conditioned by --labels. imitation: every frame counts as positive. filtered: only the positive
    frames of --labels (a control)."""
    expert: bool = False
    """The same as --mode imitation: every frame is an expert's."""
    labels: Path | None = None
    """Advantage labels (`recap label`), for --mode recap and filtered; for --mixture they are named in its file."""
    init: Path | None = None
    """Checkpoint to start from; its sizes, vocabulary and normalisation are kept."""
    new_robot: bool = False
    """Give the checkpoint of --init the robot of --dataset: its names, cameras, limits and statistics. The weights
    stay, so the checkpoint's padding must hold the robot's dimensions."""
    dropout: float | None = None
    """Share of samples without the advantage clause."""
    train: Literal["all", "no-vision", "expert"] | None = None
    """What gets gradients: everything, all but the image tower, or the action expert and the state's projection."""
    positive_share: float | None = None
    """Share of positive frames in every batch of --mode recap. Default: as in the data."""
    cotrain_share: float | None = None
    """Share of frames of demonstrations in every batch, the rest being rollouts. Default: as in the data."""
    fast: Path | None = None
    """FAST tokenizer (`recap fit-fast`, or a published folder): the backbone learns its action tokens as well."""
    fast_weight: float = 1.0
    """Weight of the action tokens' loss beside the flow-matching loss."""
    fast_ids: int | None = None
    """Vocabulary id of the first action token, for a block that no prompt uses. Default: appended to the vocabulary."""
    insulate: bool = False
    """Knowledge insulation, with --fast: the flow-matching loss trains the action expert alone, the action tokens the
    rest (image tower, language model, state projection)."""
    action_groups: tuple[str, ...] = ()
    """Groups of action dimensions as NAME=START:STOP; where the column loss_mask_NAME is 0, they are not learned."""
    lora: int | None = None
    """Rank of low-rank adapters on language model and action expert, whose own weights stay (needs --init)."""
    max_delay: int | None = None
    """Most control steps that a reply is expected to take: the policy learns to continue so many actions that have run
    in the meantime (for --chunks rtc). Default: as in --init, else 0."""
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
    """Critic to start from, every fold included; its sizes, vocabulary and normalisation are kept. What it has trained
    on it may remember, so that no fold is blind to it: there is a warning."""
    freeze: Literal["none", "vision", "all"] | None = None
    """What keeps the weights of --init. vision: the image tower up to its projection. all: the language model too, so
    that only projections, readout and head train."""
    state: bool = True
    """--no-state: a critic that sees images and task alone."""
    state_dropout: float | None = None
    """Share of samples whose state is replaced by its mean, so that the images have to do."""
    target: Literal["two_hot", "hl_gauss"] | None = None
    """How a return becomes a distribution: on the two nearest bins, or a Gaussian over bins."""
    end_weight: float | None = None
    """Weight in the loss of frames near success, those whose return is above --end-threshold; the others weigh 1."""
    end_threshold: float | None = None
    """Return above which --end-weight holds; -0.1 is the last tenth of the longest success."""
    ema: float | None = None
    """Decay of the moving average of the weights that is evaluated and published; 0 takes the last weights."""
    overrides: tyro.conf.OmitArgPrefixes[Overrides] = Overrides()


def policy(argv: list[str]) -> int:
    """Train a policy and publish its checkpoint."""
    args = tyro.cli(TrainPolicy, args=argv, prog="recap train policy", description=TrainPolicy.__doc__)
    from training.action_groups import parse_groups
    from training.policy import train_policy
    from training.settings import LossSettings

    settings = args.overrides.apply(presets.load(args.overrides.preset).policy())
    if args.new_robot and args.init is None:
        raise ValueError("--new-robot: expected --init with the checkpoint to start from, got none")
    settings = replace(settings, new_robot=args.new_robot, names_in_prompt=args.names_in_prompt)
    if args.cotrain_share is not None:
        settings = replace(settings, cotrain_share=args.cotrain_share)
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
    groups = parse_groups(args.action_groups)
    losses = LossSettings(args.fast_weight, args.fast_ids, args.insulate, groups)
    settings = replace(settings, losses=losses, lora=args.lora)
    if args.max_delay is not None:
        settings = replace(settings, max_delay=args.max_delay)
    mode, storage = "imitation" if args.expert else args.mode, args.overrides.storage(args.out)
    manifest = train_policy(settings, _data(args), args.labels, args.init, args.out, mode, args.fast, storage)
    if processes().main:
        _report(args.out, manifest)
    return 0


def critic(argv: list[str]) -> int:
    """Train a critic, publish its checkpoint and the values of all frames."""
    args = tyro.cli(TrainCritic, args=argv, prog="recap train critic", description=TrainCritic.__doc__)
    from training.critic import train_critic

    settings = args.overrides.apply(presets.load(args.overrides.preset).critic())
    names = ("freeze", "state_dropout", "target", "end_weight", "end_threshold")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    settings = replace(settings, use_state=args.state, **given)
    if args.ema is not None:
        if not 0 <= args.ema < 1:
            raise ValueError(f"--ema: expected a decay in [0, 1), got {args.ema}")
        settings = replace(settings, fit=replace(settings.fit, optim=replace(settings.fit.optim, ema=args.ema)))
    storage = args.overrides.storage(args.out)
    manifest = train_critic(
        settings, args.dataset, args.returns, args.init, args.out, args.folds, args.values_out, storage
    )
    if not processes().main:
        return 0
    _report(args.out, manifest)
    for text in manifest.metrics["warnings"]:
        print(f"warning: {text}")
    print(f"{args.out / 'report.html'}")
    return 0


def _data(args: TrainPolicy) -> "Path | Mixture":
    """What to train on: --dataset or --mixture."""
    if args.mixture is None:
        if args.dataset is None:
            raise ValueError("--dataset, --mixture: expected one of the two, got neither")
        if args.serve:
            raise ValueError(f"--serve: expected --mixture, whose datasets it chooses from, got {args.serve!r} alone")
        return args.dataset
    if args.dataset is not None:
        raise ValueError("--dataset, --mixture: expected one of the two, got both")
    from training.mixture import read_mixture

    return read_mixture(args.mixture, args.serve)


def _report(out: Path, manifest: Manifest) -> None:
    print(f"{out}: {manifest.kind} {manifest.hash[:12]}")
    for key, value in manifest.metrics.items():
        if isinstance(value, list):  # tables and warnings are shown otherwise
            continue
        print(f"  {key}: {value:.4f}" if isinstance(value, float) else f"  {key}: {value}")
