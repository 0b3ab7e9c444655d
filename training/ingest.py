"""Rollout logs (MCAP) -> one LeRobot dataset with the RECAP columns.

Everything is checked before anything is written: files that cannot be used are named, with the reason, and either
stop the ingestion or are left out, as asked; a damaged recording never disappears silently.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recap_client.rollout import Rollout, RolloutError, read_rollout
from recap_client.spec import RobotSpec, SpecError, require_equal
from recap_model.manifest import Manifest, publish, write_manifest
from recap_model.returns import rewards
from training.columns import DatasetError, require_finite
from training.dataset import VideoDatasetWriter
from training.dataset_writer import DatasetWriter, EpisodeData

PROVENANCE = Path("meta") / "recap_episodes.json"


class IngestError(ValueError):
    """The rollout folders cannot become a dataset; the message names files and reasons."""


@dataclass(frozen=True)
class Source:
    """A usable recording. success: its outcome as it will stand in the dataset."""

    path: Path
    hash: str
    steps: int
    task: str
    success: bool
    complete: bool


@dataclass(frozen=True)
class Left:
    """A recording that is left out, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Survey:
    """What the folders hold. spec: of all usable recordings, its tasks those that occur."""

    spec: RobotSpec
    sources: tuple[Source, ...]
    left: tuple[Left, ...]


def survey(
    folders: Sequence[Path], *, keep_incomplete: bool = False, skip_invalid: bool = False, served: bool = False
) -> Survey:
    """Read every recording once without its images. Raises IngestError, naming the files, when a folder holds none, or
    when one cannot be used and `skip_invalid` is not set; incomplete recordings are left out (or kept as failures).
    So are those that the policy service made; served: take the ones in which the robot asked at every control step."""
    spec: RobotSpec | None = None
    first: Path | None = None
    sources, left, invalid = [], [], []
    for path in find(folders):
        try:
            rollout = _as_executed(read_rollout(path, images=False))
            _check(rollout)
            if spec is not None:
                require_equal(spec, rollout.spec, what=f"{path} against {first}")
        except SpecError as error:
            raise IngestError(f"recordings of one dataset must come from one robot set-up: {error}") from error
        except (RolloutError, DatasetError) as error:
            invalid.append(Left(path, str(error)))
            continue
        if spec is None:
            spec, first = rollout.spec, path
        reason = _unseen(rollout, served) or _incomplete(rollout, keep_incomplete)
        if reason:
            left.append(Left(path, reason))
        else:
            sources.append(
                Source(path, _hash(path), rollout.steps, rollout.task, rollout.success is True, rollout.complete)
            )
    if invalid and not skip_invalid:
        raise IngestError(
            f"{len(invalid)} recordings cannot be used (--skip-invalid leaves them out): "
            + "; ".join(item.reason for item in invalid[:5])
        )
    if spec is None or not sources:
        reasons = "; ".join(f"{item.path.name}: {item.reason}" for item in (left + invalid)[:5]) or "no .mcap file"
        where = ", ".join(map(str, folders))
        raise IngestError(f"expected at least one usable recording in {where}, got none: {reasons}")
    tasks = tuple(sorted({source.task for source in sources}))
    return Survey(replace(spec, tasks=tasks), tuple(sources), tuple(left + invalid))


def find(folders: Sequence[Path]) -> list[Path]:
    """All recordings below the folders, each folder's in name order; also those that were never closed (.part)."""
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise IngestError(f"{folder}: expected a folder of rollouts, got none")
        mine = sorted([*folder.rglob("*.mcap"), *folder.rglob("*.mcap.part")])
        if not mine:
            raise IngestError(
                f"{folder}: expected rollouts (*.mcap), got an empty folder; `recap collect` records some"
            )
        found += mine
    return found


def ingest(
    found: Survey, out: Path, *, video: bool = False, progress: Callable[[Iterable[Source]], Iterable[Source]] = iter
) -> Manifest:
    """Write the dataset at `out` (atomically, replacing an old one) and its manifest."""
    with publish(out) as folder:
        provenance = []
        with VideoDatasetWriter(folder, found.spec) if video else DatasetWriter(folder, found.spec) as writer:
            for source in progress(found.sources):
                rollout = _as_executed(read_rollout(source.path))
                _require_cameras(rollout, found.spec)
                writer.add(_episode(rollout, source.success))
                provenance.append(_provenance(rollout, source))
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n")
        return write_manifest(
            folder,
            "dataset",
            parents={"rollouts": rollouts_hash(found.sources)},
            parameters={"video": video, "left_out": [[str(i.path), i.reason] for i in found.left]},
            metrics=_metrics(found.sources),
        )


def _episode(rollout: Rollout, success: bool) -> EpisodeData:
    """The recorded reward is -1 a step and 0 at success; what a failure costs is a choice of `recap returns`."""
    return EpisodeData(
        task=rollout.task,
        state=rollout.state,
        action=rollout.action,
        images=rollout.images,
        intervention=rollout.intervention,
        demonstration=rollout.demonstration,
        success=success,
        reward=rewards(rollout.steps, success, c_fail=1.0),
    )


def rollouts_hash(sources: Sequence[Source]) -> str:
    """One hash for a set of recordings in order."""
    return hashlib.sha256("\n".join(source.hash for source in sources).encode()).hexdigest()


def _metrics(sources: Sequence[Source]) -> dict[str, Any]:
    episodes, wins = Counter(source.task for source in sources), Counter(s.task for s in sources if s.success)
    return {
        "episodes": len(sources),
        "frames": sum(source.steps for source in sources),
        "successes": sum(wins.values()),
        "tasks": {task: {"episodes": count, "successes": wins[task]} for task, count in sorted(episodes.items())},
    }


def _provenance(rollout: Rollout, source: Source) -> dict[str, Any]:
    return {
        "file": str(source.path),
        "sha256": source.hash,
        "episode": rollout.episode,
        "task_name": rollout.task_name,
        "seed": rollout.seed,
        "policy": dict(rollout.policy) if rollout.policy else None,
        "style": rollout.style,
        "reason": rollout.reason,
        "complete": rollout.complete,
        "source": rollout.source,
        "missed_deadlines": rollout.missed_deadlines,
        "intervention_frames": int(rollout.intervention.sum()),
    }


def _incomplete(rollout: Rollout, keep: bool) -> str:
    """Why a recording is left out; empty when it is used."""
    if not rollout.steps:
        return "it was not closed and no step of it is readable" if not rollout.complete else "it holds no step"
    if rollout.success is not None or keep:
        return ""
    if rollout.complete:
        return f"its outcome is not known (ended by {rollout.reason}); --keep-incomplete takes it as a failure"
    return (
        f"it was not closed (recording interrupted), {rollout.steps} steps are readable; --keep-incomplete takes "
        "them as a failure"
    )


def _as_executed(rollout: Rollout) -> Rollout:
    """A service knows what it sent, not what the robot did: its first action stands for that (see `_unseen`)."""
    return replace(rollout, action=rollout.proposed) if rollout.source == "service" else rollout


def _unseen(rollout: Rollout, served: bool) -> str:
    """Why a recording of the service says too little; empty when it is used. Frames of a dataset are control steps."""
    if rollout.source != "service":
        return ""
    if not served:
        return (
            "the policy service recorded it, which sees neither the executed actions nor the steps between two "
            "requests; --served takes those of robots that ask at every control step"
        )
    asked, period = float(np.median(np.diff(rollout.t))) if rollout.steps > 1 else 0.0, 1 / rollout.control_hz
    if 0.5 * period <= asked <= 1.5 * period:
        return ""
    return (
        f"the policy service recorded it: expected a request at every control step ({period:.3f} s), got one in "
        f"{asked:.3f} s; the steps between are not known"
    )


def _check(rollout: Rollout) -> None:
    """NaN or infinity in what a model would learn from."""
    steps = np.arange(rollout.steps)
    zero = np.zeros(rollout.steps, np.int64)
    try:
        require_finite("state", rollout.state, zero, steps, tuple(dim.name for dim in rollout.spec.state))
        require_finite("action", rollout.action, zero, steps, tuple(dim.name for dim in rollout.spec.action))
    except DatasetError as error:
        raise DatasetError(f"{rollout.path}: {str(error).removeprefix('episode 0, ')}") from error


def _require_cameras(rollout: Rollout, spec: RobotSpec) -> None:
    missing = sorted(set(spec.camera_names) - set(rollout.images))
    if missing:
        raise IngestError(f"{rollout.path}: expected frames of {list(spec.camera_names)}, got none of {missing}")


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
