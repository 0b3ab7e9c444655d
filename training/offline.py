"""Offline action error: how far a policy's chunks are from the actions of a dataset, and whether the prompt matters.

No robot is needed, and none is replaced by it: a policy with a small error can fail, and RECAP's policy is meant to
differ from the negative frames. What to look for is in docs/training.md.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recap_model import conditioning
from recap_model.checkpoint import CheckpointFiles
from recap_model.policy.load import load_policy
from recap_model.policy.model import Policy
from training.loader import Batch, FrameTable, Loader
from training.loop import pick_device, placer
from training.table import load_table, prompted

PROMPTS = {"positive": conditioning.POSITIVE, "negative": conditioning.NEGATIVE, "none": conditioning.NONE}
"""Name -> indicator; the same names tell the labels of frames."""
HORIZONS = ("first", "chunk")
ALL = "all"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class OfflineSettings:
    """prompts: names in PROMPTS, each frame is predicted under each of them. beta: guidance of the positive and the
    negative prompt, 1 = none. frames: how many to take, at most; they are drawn by `seed`. noise_seeds: one chunk is
    sampled for each; the noise of a frame depends on (noise seed, row) alone, and is the same for every prompt."""

    prompts: tuple[str, ...] = tuple(PROMPTS)
    beta: float = 1.0
    frames: int = 512
    seed: int = 0
    noise_seeds: tuple[int, ...] = (0, 1)
    batch_size: int = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.prompts or set(self.prompts) - set(PROMPTS):
            raise ValueError(f"--indicator: expected some of {', '.join(PROMPTS)}, got {', '.join(self.prompts)!r}")
        if not self.noise_seeds or len(set(self.noise_seeds)) != len(self.noise_seeds) or min(self.noise_seeds) < 0:
            raise ValueError(f"--noise-seeds: expected different numbers >= 0, got {list(self.noise_seeds)}")
        if not np.isfinite(self.beta) or self.beta < 0:
            raise ValueError(f"--beta: expected a finite guidance weight >= 0 (1 is none), got {self.beta}")
        for name in ("frames", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"--seed: expected a number >= 0, got {self.seed}")


@dataclass(frozen=True)
class Errors:
    """Errors over `count` actions. mae, mse, r2 float64 [A], in the unit of each dimension (mse: squared); r2 is NaN
    where the recorded action has no spread. std [A]: of the action, in the checkpoint's statistics."""

    count: int
    mae: Floats
    mse: Floats
    r2: Floats
    std: Floats

    @property
    def relative_mae(self) -> Floats:
        """mae in standard deviations [A], NaN for a dimension without spread."""
        return in_std(self.mae, self.std)

    @property
    def relative_mse(self) -> Floats:
        """mse in squared standard deviations [A], NaN for a dimension without spread."""
        return in_std(in_std(self.mse, self.std), self.std)


@dataclass(frozen=True)
class Effect:
    """Mean absolute difference between two chunks of the same frame in standard deviations of the action, [A]; NaN
    for a dimension without spread. mean: over the dimensions that have one."""

    per_dimension: Floats
    mean: float


@dataclass(frozen=True)
class OfflineReport:
    """errors: (prompt, label or "all", horizon) -> Errors; labels without a frame are absent. effects: "positive
    against negative" and so on -> Effect, with the same noise on both sides; "noise" is the same prompt with two
    noises: what a prompt's effect has to be compared with. names, units: of the action's dimensions."""

    checkpoint: str
    dataset: str
    labels: str
    names: tuple[str, ...]
    units: tuple[str, ...]
    chunk: int
    frames: int
    settings: OfflineSettings
    errors: dict[tuple[str, str, str], Errors]
    effects: dict[str, Effect]


Progress = Callable[[Sequence[NDArray[np.int64]]], Iterable[NDArray[np.int64]]]


def offline_error(
    checkpoint: Path, dataset: Path, labels: Path | None, settings: OfflineSettings, progress: Progress = iter
) -> OfflineReport:
    """Predict chunks for frames of `dataset` and compare them with the recorded actions.

    labels: folder of `recap label`, to split the errors by; without it every frame counts as "none". progress: wraps
    the iteration over batches of rows. Raises ManifestError, SpecError, ValueError for what does not fit together.
    """
    source = load_table(dataset, labels=labels)
    policy, files = load_policy(checkpoint)
    source.known_robot(files, checkpoint)
    policy = policy.to(pick_device(settings.device))
    rows = choose_rows(len(source.table), settings)
    batches = [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
    loaders = {name: _loader(policy, files, source.table, indicator) for name, indicator in PROMPTS.items()}
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in settings.prompts}
    truth, valid = [], []
    for batch in progress(batches):
        inputs = {name: loader(batch, 0, train=False) for name, loader in loaders.items()}
        for name in settings.prompts:
            guide = None if name == "none" or settings.beta == 1 else inputs["none"]
            parts[name].append(
                np.stack([predict(policy, inputs[name], batch, seed, guide, settings.beta)
                          for seed in settings.noise_seeds])
            )  # fmt: skip
        truth.append(inputs["none"].actions)
        valid.append(inputs["none"].valid)
    predicted = {name: np.concatenate(chunks, axis=1) for name, chunks in parts.items()}
    real, mask, std = np.concatenate(truth), np.concatenate(valid), files.stats["action"].std
    robot = source.robot
    return OfflineReport(
        files.manifest.hash, source.hash, source.labels_hash, tuple(dim.name for dim in robot.action),
        tuple(dim.unit for dim in robot.action), policy.config.chunk, len(rows), settings,
        split_errors(predicted, real, mask, source.table.indicator[rows], std), effects(predicted, mask, std),
    )  # fmt: skip


def choose_rows(total: int, settings: OfflineSettings) -> NDArray[np.int64]:
    """Rows of the frames to look at, in order: all of them, or a draw without replacement that `seed` fixes."""
    if total <= settings.frames:
        return np.arange(total)
    return np.sort(np.random.default_rng(settings.seed).choice(total, settings.frames, replace=False)).astype(np.int64)


def predict(
    policy: Policy, batch: Batch, rows: NDArray[np.int64], seed: int, guide: Batch | None, beta: float
) -> NDArray[np.float32]:
    """Chunks [B, T, A] in physical units. guide: the same frames without the clause, for guidance by `beta`."""
    put = placer(policy)
    shape = (policy.config.chunk, policy.config.padded_action)
    noise = np.stack([np.random.default_rng([seed, row]).standard_normal(shape, np.float32) for row in rows.tolist()])
    images, state, tokens, mask = put(batch.images), put(batch.state), put(batch.tokens), put(batch.token_mask)
    with torch.inference_mode():
        if guide is None:
            chunk = policy.sample_actions(images, state, tokens, mask, put(noise))
        else:
            weight = np.full(len(rows), beta, np.float32)
            chunk = policy.sample_actions_guided(
                images, state, tokens, mask, put(guide.tokens), put(guide.token_mask), put(weight), put(noise)
            )
    found: NDArray[np.float32] = chunk.float().cpu().numpy()
    return found


def split_errors(
    predicted: dict[str, NDArray[Any]], real: NDArray[Any], valid: NDArray[np.bool_], labels: NDArray[np.int8],
    std: Floats,
) -> dict[tuple[str, str, str], Errors]:  # fmt: skip
    """Errors by prompt, label of the frame and horizon. predicted: prompt -> [seeds, N, T, A]; real [N, T, A]; valid
    [N, T]: False where the action is padding, which is left out; labels [N]; std [A]. Raises ValueError when every
    frame is padding."""
    if not valid[:, 0].any():
        raise ValueError(f"offline: expected frames with an action, got {len(valid)} frames of padding")
    groups = {ALL: np.ones(len(labels), bool)} | {name: labels == which for name, which in PROMPTS.items()}
    found = {}
    for prompt, chunks in predicted.items():
        for label, rows in groups.items():
            if not (rows & valid[:, 0]).any():
                continue
            for horizon in HORIZONS:
                mask = valid & rows[:, None]
                if horizon == "first":
                    mask = mask & (np.arange(valid.shape[1]) == 0)
                found[prompt, label, horizon] = errors(chunks[:, mask], real[mask], std)
    return found


def errors(predicted: NDArray[Any], real: NDArray[Any], std: Floats) -> Errors:
    """predicted [seeds, M, A], real [M, A], std [A]; errors are means over the seeds and the M actions.

    R2 = 1 - mse / variance: 1 is exact, 0 is what always predicting the mean of these M actions would get, and less is
    worse than that.
    """
    truth = real.astype(np.float64)
    difference = predicted.astype(np.float64) - truth
    mae, mse = np.abs(difference).mean((0, 1)), (difference**2).mean((0, 1))
    variance = truth.var(0)
    # a constant in fp32 has a variance of rounding: that is no spread to explain
    spread = variance > (1e-6 * np.maximum(1.0, np.abs(truth).max(0))) ** 2
    r2 = np.where(spread, 1 - mse / np.where(spread, variance, 1.0), np.nan)
    return Errors(len(truth), mae, mse, r2, std)


def effects(predicted: dict[str, NDArray[Any]], valid: NDArray[np.bool_], std: Floats) -> dict[str, Effect]:
    """What the prompt changes, pair by pair of prompts, and what another noise changes. Arrays as `split_errors`."""
    names = list(predicted)
    chunks = {name: values[:, valid].astype(np.float64) for name, values in predicted.items()}  # [seeds, M, A]
    found = {
        f"{a} against {b}": _effect(chunks[a] - chunks[b], std) for i, a in enumerate(names) for b in names[i + 1 :]
    }
    if len(chunks[names[0]]) > 1:
        found["noise"] = _effect(np.concatenate([np.diff(values, axis=0) for values in chunks.values()]), std)
    return found


def _effect(difference: Floats, std: Floats) -> Effect:
    relative = in_std(np.abs(difference).mean((0, 1)), std)
    return Effect(relative, mean_known(relative))


def in_std(values: Floats, std: Floats) -> Floats:
    """values / std [A], NaN where std is 0."""
    spread = std > 1e-8
    return np.where(spread, values / np.where(spread, std, 1.0), np.nan)


def mean_known(values: Floats) -> float:
    """Mean of what is not NaN; NaN of nothing."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _loader(policy: Policy, files: CheckpointFiles, table: FrameTable, indicator: int) -> Loader:
    """Batches of the table with every frame under one prompt."""
    told = replace(prompted(table, files.spec), indicator=np.full(len(table), indicator, np.int8))
    return Loader(told, files.tokenizer, chunk=policy.config.chunk, dropout=0.0, shift=0, seed=0)
