"""Train a distributional critic on returns, judge it on episodes it has not seen, and write values of every frame."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from recap_model.checkpoint import CheckpointFiles
from recap_model.critic.config import CriticConfig
from recap_model.critic.freeze import freeze
from recap_model.critic.load import load_critic
from recap_model.critic.model import Critic
from recap_model.manifest import Manifest, publish, read_manifest, write_manifest
from recap_model.normalize import NormStats
from recap_model.spec import CriticSpec
from recap_model.tokenizer import word_tokenizer
from training.checkpoint import write_checkpoint
from training.critic_loss import critic_loss
from training.critic_page import render
from training.critic_report import episode_curves, validation_report
from training.distributed import gather_rows, once, processes
from training.labels import write_values
from training.loader import Loader, Sampler, split_episodes
from training.loop import fit, forget_state, pick_device, placer
from training.policy import padded_vocabulary
from training.settings import CriticSettings
from training.streaming import MEMORY, Frames
from training.table import TableSource, image_side, load_table


def train_critic(
    settings: CriticSettings,
    dataset: Path,
    returns: Path,
    init: Path | None,
    out: Path,
    folds: int,
    values_out: Path,
    frames: Frames = MEMORY,
) -> Manifest:
    """Publish a critic at `out` and the values of every frame at `values_out`.

    folds = 1: one critic; `settings.held_out` of the episodes are kept from it and make up the validation report.
    folds = K > 1: K further critics, each blind to one K-th of the episodes, give a frame a value from one that
    has not seen its episode (for labels and for the report); the published critic has seen all.
    init: critic to start every training from, folds included; what it has seen it may remember (`init_warnings`).
    report.html lies in the checkpoint: the figures of the manifest, calibration, and curves of episodes.
    """
    if settings.freeze != "none" and init is None:
        raise ValueError(
            f"--freeze {settings.freeze}: expected --init CHECKPOINT with weights worth keeping, got none: a head on "
            "random features would be all that trains; drop --freeze to train from scratch"
        )
    source = load_table(dataset, returns=returns, frames=frames)
    t_max = read_manifest(returns).parameters["t_max"]
    parents = {"dataset": source.hash, "returns": source.labels_hash} | (
        {"init": read_manifest(init).hash} if init else {}
    )
    work = out.with_name(out.name + ".work")
    values, fold_of = np.full(len(source.table), np.nan), np.zeros(len(source.table), np.int64)
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
    judged = np.flatnonzero(fold_of >= 0)
    report = validation_report(source.table, values, judged)
    report |= {"warnings": list(init_warnings(init, source.hash, folds))}
    page = render(out.name, report, episode_curves(source.table, values, judged), folds=folds)

    def write() -> Manifest:
        parameters = {"folds": folds, **asdict(settings)}
        manifest = _publish(out, critic, files, work, page, parents, parameters, report)
        _write_values(values_out, source, values, fold_of, manifest.hash, folds, report)
        forget_state(work)
        return manifest

    return once(out, write, pick_device(settings.fit.device))


def _publish(
    out: Path,
    critic: Critic,
    files: CheckpointFiles,
    work: Path,
    page: str,
    parents: dict[str, str],
    parameters: dict[str, Any],
    report: dict[str, Any],
) -> Manifest:
    """The checkpoint, with the curve of its training and its report beside the weights."""
    with publish(out) as folder:
        weights = {name: p.detach() for name, p in critic.named_parameters()}
        write_checkpoint(folder, weights, critic.config.to_json(), files.spec, files.tokenizer, files.stats)
        (folder / "metrics.jsonl").write_text((work / "all" / "metrics.jsonl").read_text())
        (folder / "report.html").write_text(page)
        return write_manifest(folder, "critic", parents=parents, parameters=parameters, metrics=report)


def _write_values(
    out: Path,
    source: TableSource,
    values: NDArray[np.float64],
    fold_of: NDArray[np.int64],
    critic_hash: str,
    folds: int,
    report: dict[str, Any],
) -> None:
    write_values(
        out,
        source.table.episode,
        _frame_index(source),
        values,
        fold_of,
        dataset_hash=source.hash,
        critic_hash=critic_hash,
        returns_hash=source.labels_hash,
        parameters={"folds": folds},
        metrics=report,
    )


def init_warnings(init: Path | None, dataset_hash: str, folds: int) -> Iterator[str]:
    """Why figures and values of critics that started from `init` may flatter: no fold can make it forget."""
    if init is None:
        return
    held = f"each of the {folds} folds holds out" if folds > 1 else "the validation report holds out"
    if read_manifest(init).parents.get("dataset") == dataset_hash:
        yield (
            f"--init {init} has trained on this very dataset: unless the same episodes were held out then, it has seen "
            f"what {held}, and values and report flatter; train from scratch for values that nothing has leaked into"
        )
    else:
        yield (
            f"--init {init} has trained on other data: where that shares episodes with this dataset, it has seen what "
            f"{held}, and values and report flatter; train from scratch if it does"
        )


def _folds(episodes: NDArray[np.int64], folds: int, seed: int) -> list[set[int]]:
    """Episodes dealt into `folds` groups at random; each group is held out once."""
    if len(episodes) < folds:
        raise ValueError(
            f"--folds {folds}: expected at least {folds} episodes, one for every fold to hold out, got {len(episodes)}"
            "; record more, or train with --folds 1"
        )
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
    sampler = Sampler(rows, settings.fit.rows_per_step, settings.fit.seed)
    own = replace(settings, bins=critic.config.bins)  # of --init, whatever the preset says
    critic.train()
    average = fit(
        critic,
        lambda step, generator, part: critic_loss(critic, loader(sampler(step), step, part=part), own, generator),
        settings.fit,
        work,
        what=what,
        identity={"rows": len(rows), "parents": parents, "settings": asdict(settings)},
        parts=True,
    )
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            parameter.copy_(average.shadow[name])
    critic.eval()


@torch.no_grad()
def predict(
    critic: Critic, files: CheckpointFiles, source: TableSource, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Values of the given frames [len(rows)]; several processes share the work, and all get the result."""
    loader = Loader(source.table, files.tokenizer, chunk=1, dropout=0.0, shift=0, seed=0)
    blank = replace(source.table, indicator=np.full(len(source.table), -1, np.int8))
    loader.table = blank
    put, values, own = placer(critic), np.zeros(len(rows)), processes()
    mine = range(256 * own.rank, len(rows), 256 * own.count)
    for start in track(mine, "values", disable=len(rows) < 5000 or not own.main):
        batch = loader(rows[start : start + 256], 0, train=False)
        value, _ = critic(put(batch.images), put(batch.state), put(batch.tokens), put(batch.token_mask))
        values[start : start + 256] = value.double().cpu().numpy()
    return gather_rows(values, next(critic.parameters()).device)


def _start(
    settings: CriticSettings, source: TableSource, init: Path | None, t_max: dict[str, float]
) -> tuple[Critic, CheckpointFiles]:
    """A critic to train: from a checkpoint, or fresh."""
    if init is not None:
        critic, files = load_critic(init)
        if critic.config.use_state != settings.use_state:
            kinds = {True: "with state", False: "without state (--no-state)"}
            raise ValueError(
                f"{init}: expected a critic {kinds[settings.use_state]}, got one {kinds[critic.config.use_state]}; "
                "a start keeps its inputs: change the flag, or train from scratch"
            )
        freeze(critic, settings.freeze)
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
        use_state=settings.use_state,
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
