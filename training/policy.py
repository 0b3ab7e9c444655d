"""Train a policy: plain imitation, advantage-conditioned (RECAP), or imitation of the positive frames alone."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recap_model import conditioning
from recap_model.checkpoint import CheckpointFiles
from recap_model.manifest import Manifest, publish, read_manifest, write_manifest
from recap_model.normalize import NormStats
from recap_model.policy import flow
from recap_model.policy.config import ConvConfig, PolicyConfig
from recap_model.policy.load import load_policy
from recap_model.policy.model import Policy
from recap_model.spec import PolicySpec
from recap_model.tokenizer import TextTokenizer, word_tokenizer
from training.checkpoint import write_checkpoint
from training.loader import Batch, FrameTable, Loader, Sampler
from training.loop import autocast_vision, fit, forget_state, pick_device, placer
from training.sampling import BalancedSampler
from training.settings import PolicySettings
from training.table import TableSource, frame_size, image_side, load_table

Mode = Literal["imitation", "recap", "filtered"]


def train_policy(
    settings: PolicySettings, dataset: Path, labels: Path | None, init: Path | None, out: Path, mode: Mode
) -> Manifest:
    """Train on every frame of `dataset` and publish a checkpoint at `out`.

    mode: "imitation" marks every frame positive (pi*0.6 algorithm 1, line 5: the SFT stage), "recap" takes the
    indicators of `labels` (a folder of `recap label`), "filtered" only the frames that are positive there: the control
    that tells what the labels do from what the conditioning does. init: checkpoint whose weights, tokenizer and
    normalisation are the start; its sizes are kept.
    """
    if (mode != "imitation") != (labels is not None):
        raise ValueError(
            f"--labels: mode {mode!r} "
            + (
                "needs a label folder (made by `recap label`), got none"
                if mode != "imitation"
                else f"takes no labels, got {labels}; use --mode recap"
            )
        )
    source = load_table(dataset, labels=labels)
    table = with_indicator(source.table, mode)
    policy, files = _start(settings, source, init)
    loader = Loader(
        table,
        files.tokenizer,
        chunk=policy.config.chunk,
        dropout=settings.dropout,
        shift=settings.shift,
        seed=settings.fit.seed,
    )
    sampler, frames = _sampler(settings, table, mode)
    parents = {"dataset": source.hash} | ({"labels": source.labels_hash} if labels else {})
    parents |= {"init": read_manifest(init).hash} if init else {}
    work = out.with_name(out.name + ".work")
    average = fit(
        policy,
        lambda step, generator: policy_loss(policy, loader(sampler(step), step), settings.draws, generator),
        settings.fit,
        work,
        what=f"policy ({mode})",
        identity={"mode": mode, "parents": parents, "settings": asdict(settings)},
    )
    shares = {str(i): float((table.indicator == i).mean()) for i in (-1, 0, 1)}
    with publish(out) as folder:
        write_checkpoint(folder, average.shadow, policy.config.to_json(), files.spec, files.tokenizer, files.stats)
        (folder / "metrics.jsonl").write_text((work / "metrics.jsonl").read_text())
        manifest = write_manifest(
            folder,
            "policy",
            parents=parents,
            parameters={"mode": mode, **asdict(settings), **_origin(init)},
            metrics={
                "frames": len(table),
                "indicator_share": shares,
                "epochs": settings.fit.steps * settings.fit.batch_size / frames,
            },
        )
    forget_state(work)
    return manifest


def _sampler(settings: PolicySettings, table: FrameTable, mode: Mode) -> tuple[Callable[[int], NDArray[np.int64]], int]:
    """(step -> rows of its batch, frames that they are drawn from)."""
    size, seed = settings.fit.batch_size, settings.fit.seed
    positive = table.indicator == conditioning.POSITIVE
    if mode == "filtered":
        return Sampler(np.flatnonzero(positive), size, seed), int(positive.sum())
    if mode == "recap" and settings.positive_share is not None:
        groups = np.flatnonzero(positive), np.flatnonzero(~positive)
        return BalancedSampler(*groups, size, settings.positive_share, seed), len(table)
    return Sampler(np.arange(len(table)), size, seed), len(table)


def policy_loss(policy: Policy, batch: Batch, draws: int, generator: torch.Generator) -> Tensor:
    """Flow-matching loss; each encoded observation is used with `draws` pairs of noise and time."""
    put = placer(policy)
    with autocast_vision(policy):
        seen = policy.see(put(batch.images))
    prefix = policy.read(seen.float(), put(batch.state), put(batch.tokens), put(batch.token_mask)).repeat(draws)
    actions = policy.normalize_actions(put(batch.actions)).repeat_interleave(draws, 0)
    # drawn on the CPU whatever the device: the same seed is the same run
    noise = torch.randn(actions.shape, generator=generator).to(actions.device)
    time = flow.sample_time(len(actions), generator).to(actions.device)
    noisy, target = flow.interpolate(actions, noise, time)
    valid = put(batch.valid).repeat_interleave(draws, 0)
    own = slice(policy.config.action_dim)  # what pads the action to the model's width is nothing to learn
    return flow.loss(policy.velocity(noisy, time, prefix)[..., own], target[..., own], valid)


def with_indicator(table: FrameTable, mode: Mode) -> FrameTable:
    """The table with the indicators that `mode` trains on."""
    if mode != "imitation":
        return table
    # Not without the clause: the services always say positive, and a policy that never read it would be lost.
    return replace(table, indicator=np.full(len(table), conditioning.POSITIVE, np.int8))


def _start(settings: PolicySettings, source: TableSource, init: Path | None) -> tuple[Policy, CheckpointFiles]:
    """A policy to train: from a checkpoint, or fresh with statistics and vocabulary of the data."""
    if init is not None:
        policy, files = load_policy(init)
        robot = source.known_robot(files, init)
        return _placed(policy.train(), settings), replace(files, spec=replace(files.spec, robot=robot))
    stats = {"state": NormStats.of(source.table.state), "action": NormStats.of(source.table.action)}
    tokenizer = word_tokenizer(source.table.tasks, settings.max_tokens)
    robot = source.robot
    vision, vocabulary = settings.vision, padded_vocabulary(tokenizer)
    if isinstance(vision, ConvConfig):
        vision = replace(vision, image_size=image_side(robot))
    else:  # LeRobot's layout: the preset's vocabulary stays, with room for the special tokens that an export adds
        vocabulary = max(settings.language.vocabulary, padded_vocabulary(tokenizer, spare=4))
    config = PolicyConfig(
        vision,
        replace(settings.language, vocabulary=vocabulary),
        settings.expert,
        cameras=len(robot.cameras),
        state_dim=len(robot.state),
        action_dim=len(robot.action),
        chunk=settings.chunk,
        max_tokens=tokenizer.max_tokens,
        denoise_steps=settings.denoise_steps,
        frame=frame_size(robot),
        state_width=settings.state_width,
        action_width=settings.action_width,
    )
    torch.manual_seed(settings.fit.seed)
    policy = _placed(Policy(config, stats), settings)
    spec = PolicySpec(robot, settings.chunk, tokenizer.max_tokens)
    return policy, CheckpointFiles(Path(), config.to_json(), spec, tokenizer, stats, None)  # type: ignore[arg-type]


def _placed(policy: Policy, settings: PolicySettings) -> Policy:
    """On the device to train on, with `settings.train` applied; channels last is what convolutions are fastest with."""
    kept = {"all": (), "no-vision": (policy.vision,), "expert": (policy.vision, policy.language)}
    for part in kept[settings.train]:
        part.requires_grad_(False)
    device = pick_device(settings.fit.device)
    return policy.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _origin(init: Path | None) -> dict[str, str]:
    """What an export to LeRobot needs to know of the checkpoint that training started from."""
    name = read_manifest(init).parameters.get("vlm_name") if init else None
    return {"vlm_name": name} if name else {}


def padded_vocabulary(tokenizer: TextTokenizer, spare: int = 0) -> int:
    """Vocabulary size with `spare` more tokens, rounded up to a multiple of 8, as matrix units like it."""
    return 8 * math.ceil((tokenizer.vocabulary_size + spare) / 8)
