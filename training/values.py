"""Values of all frames of a dataset from a finished critic, in parts that any number of processes share.

The frames are cut into segments, and every segment becomes a file in `<out>.work/`. A process computes those of its
shard that are not there yet; whoever completes the set publishes `out`. Batches are cut the same way whatever the
number of shards, so the result is the same bytes.
"""

import json
import os
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from recap_client.spec import require_equal
from recap_model import conditioning
from recap_model.checkpoint import CheckpointFiles
from recap_model.critic.load import load_critic
from recap_model.critic.model import Critic
from recap_model.manifest import Manifest, read_manifest
from training.dataset import Dataset, open_dataset
from training.labels import write_values
from training.loader import Loader, split_episodes
from training.loop import pick_device, placer
from training.streaming import alone
from training.table import read_frames, require_known_words

BATCHES_PER_SEGMENT = 16


class ValuesError(ValueError):
    """Values cannot be computed or put together."""


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    def of(self, segments: int) -> range:
        """The segments of this shard: neighbours, so that episodes are decoded once. Empty when there are fewer."""
        return range(segments * self.index // self.count, segments * (self.index + 1) // self.count)


def parse_shard(text: str) -> Shard:
    """ "0/8" -> the first of eight."""
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return Shard(int(index), int(count))
    raise ValuesError(f"--shard: expected i/n with i from 0 to n - 1, as 0/8 and 7/8, got {text!r}")


@dataclass(frozen=True)
class Job:
    """What all shards of a run agree on."""

    data: Dataset
    critic: Path
    manifest: Manifest
    out: Path
    batch: int

    @property
    def work(self) -> Path:
        return self.out.with_name(self.out.name + ".work")

    @property
    def segments(self) -> int:
        return -(-self.data.frames // (self.batch * BATCHES_PER_SEGMENT))

    def rows(self, segment: int) -> range:
        """Frames of a segment, in dataset order."""
        size = self.batch * BATCHES_PER_SEGMENT
        return range(segment * size, min((segment + 1) * size, self.data.frames))

    def part(self, segment: int) -> Path:
        return self.work / f"part-{segment:06d}.npy"

    def read(self, segment: int) -> NDArray[np.float64] | None:
        """The values of a segment, None while there is no whole file of them."""
        try:
            found: NDArray[np.float64] = np.load(self.part(segment))
        except (OSError, ValueError, EOFError):
            return None
        return found if found.shape == (len(self.rows(segment)),) and found.dtype == np.float64 else None

    def parents(self) -> dict[str, str]:
        return {"dataset": self.data.hash, "critic": self.manifest.hash}

    def claim(self) -> None:
        """Make the work folder, or refuse one that belongs to other data, another critic or other batches."""
        wanted = {**self.parents(), "batch_size": self.batch}
        path = self.work / "job.json"
        self.work.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            _replace(path, (json.dumps(wanted, indent=1) + "\n").encode())
        found = json.loads(path.read_text())
        keys = sorted(k for k in wanted if found.get(k) != wanted[k])
        if keys:
            raise ValuesError(
                f"{self.work}: holds parts of a run with other {', '.join(keys)}: expected "
                f"{[wanted[k] for k in keys]}, got {[found.get(k) for k in keys]}; finish that run or remove the folder"
            )

    def done(self) -> Manifest | None:
        """The manifest of `out` if it already holds this job's result."""
        if not (self.out / "manifest.json").is_file():
            return None
        manifest = read_manifest(self.out)
        same = all(manifest.parents.get(role) == got for role, got in self.parents().items())
        return manifest if same and manifest.parameters.get("batch_size") == self.batch else None


@dataclass(frozen=True)
class Progress:
    """manifest: of the published values, None while parts are missing (`missing` of `segments`)."""

    manifest: Manifest | None
    missing: int
    segments: int


def compute_values(
    critic: Path,
    dataset: Path,
    out: Path,
    *,
    shard: Shard = Shard(),
    batch_size: int = 256,
    unseen: bool = False,
    device: str = "auto",
    show: bool = True,
) -> Progress:
    """Compute this shard's values, and publish all at `out` (as `recap train critic --values-out`) if none is missing.

    unseen: the critic has trained on none of these episodes; without it, only what it held out of this very dataset
    counts as unseen. show: progress bar. Raises ValuesError, SpecError (data of another robot), ManifestError.
    """
    if batch_size < 1:
        raise ValuesError(f"--batch-size: expected at least 1 frame, got {batch_size}")
    module, files = load_critic(critic)
    manifest = read_manifest(critic, "critic")
    data = open_dataset(dataset)
    if unseen and manifest.parents.get("dataset") == data.hash:
        raise ValuesError(f"--unseen: expected other data than {critic} trained on, got its own dataset {dataset}")
    _require_known(files, data, critic)
    job = Job(data, critic, manifest, out, batch_size)
    if (finished := job.done()) is not None:
        return Progress(finished, 0, job.segments)
    job.claim()
    module.to(device=pick_device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    todo = [segment for segment in shard.of(job.segments) if job.read(segment) is None]
    for segment in track(todo, f"values {shard.index}/{shard.count}", disable=not show or len(todo) < 2):
        _save(job.part(segment), _predict(module, files, job, segment))
    return _merge(job, unseen)


def _predict(critic: Critic, files: CheckpointFiles, job: Job, segment: int) -> NDArray[np.float64]:
    """Values of a segment's frames. Only the episodes that it touches are decoded."""
    rows = job.rows(segment)
    ends = np.cumsum([len(episode) for episode in job.data.episodes])
    first, last = np.searchsorted(ends, [rows.start, rows.stop - 1], side="right")
    offset = int(ends[first - 1]) if first else 0
    table, _ = read_frames(replace(job.data, episodes=job.data.episodes[first : last + 1]), show=False)
    loader = Loader(table, files.tokenizer, chunk=1, dropout=0.0, shift=0, seed=0)
    put, values = placer(critic), []
    with torch.no_grad():
        for start in range(rows.start, rows.stop, job.batch):
            batch = loader(np.arange(start, min(start + job.batch, rows.stop)) - offset, 0, train=False)
            value, _ = critic(put(batch.images), put(batch.state), put(batch.tokens), put(batch.token_mask))
            values.append(value.double().cpu().numpy())
    return np.concatenate(values)


def _merge(job: Job, unseen: bool) -> Progress:
    """Publish when every segment is there; of several processes that see this, the first one does it."""
    try:
        return _merge_alone(job, unseen)
    except FileNotFoundError:  # the first one has published, and removed the folder that the lock lay in
        if (finished := job.done()) is None:
            raise
        return Progress(finished, 0, job.segments)


def _merge_alone(job: Job, unseen: bool) -> Progress:
    with alone(job.work / "merge.lock"):
        if (finished := job.done()) is not None:
            return Progress(finished, 0, job.segments)
        parts = [job.read(segment) for segment in range(job.segments)]
        found = [part for part in parts if part is not None]
        if len(found) < job.segments:
            return Progress(None, job.segments - len(found), job.segments)
        trained = job.manifest.parents.get("dataset") == job.data.hash
        episode, frame = job.data.keys()
        manifest = write_values(
            job.out,
            episode,
            frame,
            np.concatenate(found),
            held_out_fold(job.manifest, episode, trained=trained, unseen=unseen),
            dataset_hash=job.data.hash,
            critic_hash=job.manifest.hash,
            returns_hash=job.manifest.parents.get("returns") if trained else None,
            parameters={"folds": job.manifest.parameters.get("folds", 1), "batch_size": job.batch},
            metrics=job.manifest.metrics if trained else {},
        )
        shutil.rmtree(job.work, ignore_errors=True)
        return Progress(manifest, 0, job.segments)


def held_out_fold(critic: Manifest, episode: NDArray[np.int64], *, trained: bool, unseen: bool) -> NDArray[np.int64]:
    """int64 [F]: 0 where the critic has not seen the frame's episode, -1 where it has, or may have."""
    parameters: dict[str, Any] = critic.parameters
    if unseen:
        return np.zeros(len(episode), np.int64)
    if not trained or parameters.get("folds") != 1:  # with folds, the published critic has seen all
        return np.full(len(episode), -1, np.int64)
    _, held = split_episodes(np.unique(episode), parameters["held_out"], parameters["fit"]["seed"])
    return np.where(np.isin(episode, sorted(held)), 0, -1).astype(np.int64)


def _require_known(files: CheckpointFiles, data: Dataset, where: Path) -> None:
    """The critic's robot, and tasks in words that it knows."""
    known = files.spec.robot
    tasks = sorted({episode.task for episode in data.episodes})
    require_equal(known, replace(data.spec, tasks=tuple(tasks)), what=f"dataset against {where}")
    new = [task for task in tasks if task not in known.tasks]
    require_known_words(files, {task: conditioning.unconditional_prompt(task) for task in new}, where)


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody else takes: shards in containers or on other nodes share process numbers."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def _save(path: Path, values: NDArray[np.float64]) -> None:
    temporary = _temporary(path)
    with temporary.open("wb") as stream:
        np.save(stream, values)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _replace(path: Path, content: bytes) -> None:
    temporary = _temporary(path)
    temporary.write_bytes(content)
    os.replace(temporary, path)
