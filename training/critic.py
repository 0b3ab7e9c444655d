"""Train a distributional critic on returns, judge it on episodes it has not seen, and write values of every frame."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from recap_model.checkpoint import CheckpointFiles
from recap_model.critic.config import CriticConfig
from recap_model.critic.load import load_critic
from recap_model.critic.model import Critic
from recap_model.manifest import Manifest, publish, read_manifest, write_manifest
from recap_model.normalize import NormStats
from recap_model.returns import hl_gauss, two_hot
from recap_model.spec import CriticSpec
from recap_model.tokenizer import word_tokenizer
from training.checkpoint import write_checkpoint
from training.critic_report import validation_report
from training.labels import write_values
from training.loader import Loader, Sampler, split_episodes
from training.loop import autocast_vision, fit, forget_state, pick_device, placer
from training.policy import padded_vocabulary
from training.settings import CriticSettings
from training.table import TableSource, image_side, load_table


def train_critic(
    settings: CriticSettings, dataset: Path, returns: Path, init: Path | None, out: Path, folds: int, values_out: Path
) -> Manifest:
    """Publish a critic at `out` and the values of every frame at `values_out`.

    folds = 1: one critic; `settings.held_out` of the episodes are kept from it and make up the validation report.
    folds = K > 1: K further critics, each blind to one K-th of the episodes, give a frame a value from one that
    has not seen its episode (for labels and for the report); the published critic has seen all.
    """
    source = load_table(dataset, returns=returns)
    t_max = read_manifest(returns).parameters["t_max"]
    parents = {"dataset": source.hash, "returns": source.labels_hash} | (
        {"init": read_manifest(init).hash} if init else {}
    )
    work = out.with_name(out.name + ".work")
    values = np.full(len(source.table), np.nan)
    fold_of = np.zeros(len(source.table), np.int64)
    episodes = np.unique(source.table.episode)
    for fold, held in enumerate(_folds(episodes, folds, settings.fit.seed) if folds > 1 else []):
        critic, files = _start(settings, source, init, t_max)
        rows = np.flatnonzero(np.isin(source.table.episode, sorted(held)))
        seen = np.flatnonzero(~np.isin(source.table.episode, sorted(held)))
        _fit(critic, files, source, settings, seen, work / f"fold{fold}", f"critic fold {fold + 1}/{folds}", parents)
        values[rows] = predict(critic, files, source, rows)
        fold_of[rows] = fold
    _, held = split_episodes(episodes, 0.0 if folds > 1 else settings.held_out, settings.fit.seed)
    critic, files = _start(settings, source, init, t_max)
    unseen = np.isin(source.table.episode, sorted(held))
    _fit(critic, files, source, settings, np.flatnonzero(~unseen), work / "all", "critic", parents)
    if folds == 1:
        values[:] = predict(critic, files, source, np.arange(len(source.table)))
        fold_of[:] = np.where(unseen, 0, -1)
    report = validation_report(source.table, values, np.flatnonzero(fold_of >= 0))
    with publish(out) as folder:
        weights = {name: p.detach() for name, p in critic.named_parameters()}
        write_checkpoint(folder, weights, critic.config.to_json(), files.spec, files.tokenizer, files.stats)
        (folder / "metrics.jsonl").write_text((work / "all" / "metrics.jsonl").read_text())
        manifest = write_manifest(
            folder, "critic", parents=parents, parameters={"folds": folds, **asdict(settings)}, metrics=report
        )
    write_values(
        values_out,
        source.table.episode,
        _frame_index(source),
        values,
        fold_of,
        dataset_hash=source.hash,
        critic_hash=manifest.hash,
        returns_hash=source.labels_hash,
        parameters={"folds": folds},
        metrics=report,
    )
    forget_state(work)
    return manifest


def _folds(episodes: NDArray[np.int64], folds: int, seed: int) -> list[set[int]]:
    """Episodes dealt into `folds` groups at random; each group is held out once."""
    order = np.random.default_rng([seed, 11]).permutation(episodes)
    return [{int(e) for e in order[i::folds]} for i in range(folds)]


def _fit(
    critic: Critic,
    files: CheckpointFiles,
    source: TableSource,
    settings: CriticSettings,
    rows: NDArray[np.int64],
    work: Path,
    what: str,
    parents: dict[str, str],
) -> None:
    """Train `critic` on `rows`, ending with the averaged weights in place."""
    loader = Loader(source.table, files.tokenizer, chunk=1, dropout=0.0, shift=settings.shift, seed=settings.fit.seed)
    sampler = Sampler(rows, settings.fit.batch_size, settings.fit.seed)
    encode, put = target_encoder(settings), placer(critic)
    critic.train()

    def loss_step(step: int, generator: torch.Generator) -> Tensor:
        batch = loader(sampler(step), step)
        noise = torch.randn(batch.state.shape, generator=generator) * settings.state_noise
        state = put(batch.state) + noise.to(critic.state_scale.device) * critic.state_scale
        with autocast_vision(critic):
            seen = critic.see(put(batch.images))
        logits = critic.read(seen.float(), state, put(batch.tokens), put(batch.token_mask))
        return F.cross_entropy(logits, put(encode(batch.target)))

    average = fit(
        critic,
        loss_step,
        settings.fit,
        work,
        what=what,
        identity={"rows": len(rows), "parents": parents, "settings": asdict(settings)},
    )
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            parameter.copy_(average.shadow[name])
    critic.eval()


def target_encoder(settings: CriticSettings) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Returns [B] in [-1, 0] -> target distributions float32 [B, bins]."""
    if settings.target == "two_hot":
        return lambda r: two_hot(r.astype(np.float64), settings.bins, -1.0, 0.0).astype(np.float32)
    if settings.target == "hl_gauss":
        return lambda r: hl_gauss(r.astype(np.float64), settings.bins, -1.0, 0.0, settings.sigma_bins).astype(
            np.float32
        )
    raise ValueError(f"critic target: expected two_hot or hl_gauss, got {settings.target!r}")


@torch.no_grad()
def predict(
    critic: Critic, files: CheckpointFiles, source: TableSource, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Values of the given frames [len(rows)]."""
    loader = Loader(source.table, files.tokenizer, chunk=1, dropout=0.0, shift=0, seed=0)
    blank = replace(source.table, indicator=np.full(len(source.table), -1, np.int8))
    loader.table = blank
    put, values = placer(critic), []
    for start in track(range(0, len(rows), 256), "values", disable=len(rows) < 5000):
        batch = loader(rows[start : start + 256], 0, train=False)
        value, _ = critic(put(batch.images), put(batch.state), put(batch.tokens), put(batch.token_mask))
        values.append(value.double().cpu().numpy())
    return np.concatenate(values)


def _start(
    settings: CriticSettings, source: TableSource, init: Path | None, t_max: dict[str, float]
) -> tuple[Critic, CheckpointFiles]:
    """A critic to train: from a checkpoint, or fresh."""
    if init is not None:
        critic, files = load_critic(init)
        spec = replace(cast(CriticSpec, files.spec), robot=source.known_robot(files, init))
        critic.to(device=pick_device(settings.fit.device), memory_format=torch.channels_last)  # type: ignore[call-overload]
        return critic, replace(files, spec=replace(spec, t_max={**spec.t_max, **t_max}))
    robot = source.robot
    tokenizer = word_tokenizer(source.table.tasks, settings.max_tokens)
    stats = {"state": NormStats.of(source.table.state)}
    config = CriticConfig(
        replace(settings.vision, image_size=image_side(robot)),
        replace(settings.language, vocabulary=padded_vocabulary(tokenizer)),
        cameras=len(robot.cameras),
        state_dim=len(robot.state),
        max_tokens=tokenizer.max_tokens,
        bins=settings.bins,
        dropout=settings.dropout,
    )
    torch.manual_seed(settings.fit.seed)
    critic = Critic(config, stats)
    critic.to(device=pick_device(settings.fit.device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    spec = CriticSpec(robot, tokenizer.max_tokens, config.bins, config.low, config.high, dict(t_max))
    return critic, CheckpointFiles(Path(), config.to_json(), spec, tokenizer, stats, None)  # type: ignore[arg-type]


def _frame_index(source: TableSource) -> NDArray[np.int64]:
    """Index of every frame within its episode."""
    starts = np.unique(source.table.episode, return_index=True)[1]
    first = np.zeros(len(source.table), np.int64)
    first[np.sort(starts)] = np.diff(np.sort(starts), prepend=0)
    return np.arange(len(source.table)) - np.cumsum(first)
