"""Fit a FAST tokenizer on the chunks of a dataset, as the loader will draw them, and measure it."""

from pathlib import Path

import numpy as np
from rich.progress import track

from recap_model.checkpoint import read_checkpoint
from recap_model.manifest import Manifest, publish, read_manifest, write_manifest
from recap_model.normalize import NormStats, normalize
from recap_model.policy.fast_tokenizer import FastTokenizer, cosine_basis, fit_fast
from recap_model.spec import PolicySpec
from training.action_tokens import chunk_rows, normalized_chunks
from training.dataset import open_dataset

_MEASURED = 2000


def fit_dataset(
    dataset: Path,
    out: Path,
    *,
    chunk: int | None = None,
    init: Path | None = None,
    scale: float = 10.0,
    vocabulary: int = 1024,
    most: int = 10_000,
    seed: int = 0,
) -> Manifest:
    """Fit on at most `most` chunks of `dataset` and publish the tokenizer at `out`. Raises ValueError.

    Metrics: tokens_per_chunk, numbers_per_chunk (what they stand for), rmse (of the normalised actions), coefficients
    (different ones, of `vocabulary`).
    """
    data = open_dataset(dataset)
    action = np.concatenate([episode.action for episode in data.episodes])
    stats, length = _normalisation(action, chunk, init)
    lengths = np.array([len(episode) for episode in data.episodes])
    end = np.repeat(lengths.cumsum(), lengths)
    low, high = 0, 0
    for block in normalized_chunks(action, end, stats, length):
        values = np.rint(cosine_basis(length) @ block.astype(np.float64) * scale)
        low, high = min(low, int(values.min())), max(high, int(values.max()))
    rows = np.random.default_rng([seed, 13]).permutation(len(action))[:most]
    sample = normalize(action, stats, "quantile")[chunk_rows(rows, end[rows], length)]
    fast = fit_fast(sample, scale=scale, vocabulary=vocabulary, span=(low, high))
    with publish(out) as folder:
        fast.save(folder)
        return write_manifest(
            folder,
            "fast",
            parents={"dataset": data.hash} | ({"init": read_manifest(init).hash} if init else {}),
            parameters={"chunk": length, "scale": scale, "vocabulary": vocabulary, "most": most, "seed": seed},
            metrics={"coefficients": high - low + 1, "numbers_per_chunk": sample[0].size, **measure(fast, sample)},
        )


def measure(fast: FastTokenizer, chunks: np.ndarray) -> dict[str, float]:  # type: ignore[type-arg]
    """Tokens per chunk and root mean square error of the first of `chunks` [N, T, A] (normalised)."""
    part = chunks[:_MEASURED]
    tokens, square = 0, 0.0
    for chunk in track(part, "encoding", disable=len(part) < _MEASURED):
        ids = fast.encode(chunk)
        tokens += len(ids)
        square += float(((fast.decode(ids) - chunk) ** 2).mean())
    return {"tokens_per_chunk": tokens / len(part), "rmse": (square / len(part)) ** 0.5}


def _normalisation(action: np.ndarray, chunk: int | None, init: Path | None) -> tuple[NormStats, int]:  # type: ignore[type-arg]
    """(statistics that training will normalise with, chunk length)."""
    if init is None:
        if chunk is None:
            raise ValueError(
                "--chunk: expected the chunk length of the policy to train, got none; or name it by --init"
            )
        if chunk < 1:
            raise ValueError(f"--chunk: expected at least 1 action, got {chunk}")
        return NormStats.of(action), chunk
    files = read_checkpoint(init, "policy")
    assert isinstance(files.spec, PolicySpec)
    if chunk not in (None, files.spec.chunk):
        raise ValueError(f"--chunk: expected {files.spec.chunk}, the chunk length of {init}, got {chunk}; drop it")
    stats = files.stats["action"]
    if len(stats.mean) != action.shape[1]:
        raise ValueError(
            f"--init {init}: expected actions of {len(stats.mean)} dimensions, got {action.shape[1]} in the data; it "
            "is a checkpoint of another robot"
        )
    return stats, files.spec.chunk
