"""Everything that is wrong with a dataset, in one list: what `open_dataset` would refuse and what would train badly."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recap_model.manifest import NAME as MANIFEST
from recap_model.manifest import ManifestError, verify
from training.data_check_files import (
    BROKEN,
    VECTORS,
    Loose,
    Problem,
    Progress,
    image_problems,
    read_loosely,
    vector,
    video_problems,
)
from training.data_check_outcomes import flag_problems, outcome_problems
from training.data_check_signals import (
    duplicate_problems,
    finite_problems,
    frozen_problems,
    limit_problems,
    short_problems,
    time_problems,
)
from training.dataset import open_dataset
from training.lerobot_files import IMAGES, SPEC_FILE

_NEEDED = ("episode_index", "frame_index", "task_index", *VECTORS)


@dataclass(frozen=True)
class Report:
    """problems: errors first."""

    dataset: str
    episodes: int
    frames: int
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> int:
        return sum(problem.severity == "error" for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "episodes": self.episodes,
            "frames": self.frames,
            "errors": self.errors,
            "warnings": len(self.problems) - self.errors,
            "problems": [problem.to_json() for problem in self.problems],
        }


def check_dataset(root: Path, progress: Progress = iter) -> Report:
    """Every problem of the dataset at `root`. Raises nothing for what is in its files; a report without errors means
    that `open_dataset` opens it."""
    loose = read_loosely(root)
    problems = list(loose.problems)
    if loose.info:
        for name, check in CHECKS.items():
            problems += _guarded(name, lambda check=check: check(loose))  # type: ignore[misc]
        problems += _guarded("images", lambda: image_problems(loose, progress))
        problems += _guarded("videos", lambda: video_problems(loose, progress))
    if not any(problem.severity == "error" for problem in problems):
        problems += _guarded("opening", lambda: _opens(root))
    problems.sort(key=lambda problem: problem.severity != "error")
    frames = len(next(iter(loose.columns.values()), ()))
    return Report(str(root), len({index for index, _ in loose.runs}), frames, tuple(problems))


def _guarded(name: str, check: Callable[[], Iterator[Problem]]) -> list[Problem]:
    found: list[Problem] = []
    try:
        for problem in check():
            found.append(problem)
    except BROKEN as error:
        found.append(Problem("error", name, f"cannot be checked any further ({type(error).__name__}: {error})"))
    return found


def _opens(root: Path) -> Iterator[Problem]:
    try:
        open_dataset(root)
    except BROKEN as error:
        yield Problem("error", "opening", str(error) or type(error).__name__)


def _layout(loose: Loose) -> Iterator[Problem]:
    """Columns that must be there, frames in order, tables that agree."""
    for name in _NEEDED:
        if name not in loose.columns and not any(problem.column == name for problem in loose.problems):
            yield Problem("error", "layout", f"expected this column, got {sorted(loose.columns)}", column=name)
    if not loose.fps > 0:
        yield Problem("error", "layout", f"meta/info.json: fps: expected a positive rate, got {loose.info.get('fps')}")
    yield from _vectors(loose)
    pieces: dict[int, int] = {}
    for index, _ in loose.runs:
        pieces[index] = pieces.get(index, 0) + 1
    for index, count in pieces.items():
        if count > 1:
            yield Problem("error", "layout", f"expected its frames in one piece, got {count} pieces", index)
    for index, rows in loose.runs if "frame_index" in loose.columns else ():
        frame = loose.columns["frame_index"][rows]
        wrong = np.flatnonzero(frame != np.arange(len(frame)))
        if wrong.size and pieces[index] == 1:
            text = f"expected 0, 1, 2 ..., got {frame[wrong[0]]} in place {wrong[0]} ({wrong.size} such frames)"
            yield Problem("error", "layout", text, index, "frame_index")
    yield from _counts(loose, len(pieces))
    task = loose.columns.get("task_index")
    if task is None or loose.tasks is None:
        return
    for index, rows in loose.runs:
        unknown = sorted(set(task[rows].tolist()) - set(loose.tasks), key=str)
        if unknown:
            text = f"expected one of {sorted(loose.tasks)} (meta/tasks.parquet), got {unknown}"
            yield Problem("error", "layout", text, index, "task_index")


def _vectors(loose: Loose) -> Iterator[Problem]:
    dims = {"observation.state": loose.spec.state, "action": loose.spec.action} if loose.spec else {}
    for name, expected in dims.items():
        values = loose.columns.get(name)
        if values is not None and (vector(loose, name) is None or values.size != len(values) * len(expected)):
            got = f"shape {list(values.shape)} of {values.dtype}"
            text = f"expected {len(expected)} numbers a frame (the spec's), got {got}"
            yield Problem("error", "layout", text, column=name)


def _counts(loose: Loose, episodes: int) -> Iterator[Problem]:
    frames = len(loose.columns.get("episode_index", ()))
    for key, count in (("episodes", episodes), ("frames", frames)):
        stated = loose.info.get(f"total_{key}")
        if loose.columns and stated != count:
            yield Problem(
                "error", "layout", f"{key}: expected {stated} (meta/info.json), got {count} in the data files"
            )
    lengths = loose.table.get("length")
    if lengths is None:
        return
    if len(lengths) != episodes:
        yield Problem("error", "layout", f"meta/episodes: expected {episodes} rows (the data's), got {len(lengths)}")
    elif len(loose.runs) == episodes:
        for (index, rows), length in zip(loose.runs, lengths.tolist(), strict=True):
            if rows.stop - rows.start != length:
                text = f"expected {length} frames (meta/episodes), got {rows.stop - rows.start}"
                yield Problem("error", "layout", text, index)


def _cameras(loose: Loose) -> Iterator[Problem]:
    """Cameras of the spec that the dataset has no feature of, or in another size."""
    for camera in loose.spec.cameras if loose.spec else ():
        feature = loose.pictures.get(IMAGES + camera.name)
        if feature is None:
            text = f"expected camera {camera.name!r} of {SPEC_FILE}, got features of {sorted(loose.pictures)}"
            yield Problem("error", "cameras", text, column=IMAGES + camera.name)
        elif sorted(map(int, feature["shape"])) != sorted((camera.height, camera.width, 3)):
            text = f"expected {camera.height}x{camera.width} ({SPEC_FILE}), got shape {list(feature['shape'])}"
            yield Problem("error", "cameras", text, column=IMAGES + camera.name)


def _manifest(loose: Loose) -> Iterator[Problem]:
    if (loose.root / MANIFEST).is_file():
        try:
            verify(loose.root, "dataset")
        except ManifestError as error:
            yield Problem("error", "manifest", f"{error}; the dataset was changed after it was made")


CHECKS: dict[str, Callable[[Loose], Iterator[Problem]]] = {
    "layout": _layout,
    "cameras": _cameras,
    "finite": finite_problems,
    "time": time_problems,
    "outcome": outcome_problems,
    "flags": flag_problems,
    "limits": limit_problems,
    "frozen": frozen_problems,
    "short": short_problems,
    "duplicate": duplicate_problems,
    "manifest": _manifest,
}
