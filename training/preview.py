"""What would be positive with these labels, as a film: the clearest and the closest decisions of every task.

A wrong rule shows here in a minute, before it costs a training. Pure drawing: nothing is labelled or changed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recap_model import conditioning
from recap_model.report.video import encode_h264
from training.dataset import Dataset
from training.labels import LabelError, LabelledFrames
from training.preview_draw import VIEW, draw_page, draw_sheet
from training.view import rows_of

KINDS = ("most positive", "borderline", "most negative")


@dataclass(frozen=True)
class Moment:
    """A frame worth looking at. kind: one of KINDS; place: of the episode in the dataset; frame: in the episode; row:
    in arrays of the dataset; start, stop: first frame of its clip and the one after the last."""

    kind: str
    task: str
    place: int
    frame: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Shot:
    """A moment with its pictures. frames uint8 [L, H, W, 3]: cameras side by side, reduced; advantage, threshold [L]
    and indicator int8 [L] of the clip's frames; source: the rule that labelled the moment's own frame."""

    moment: Moment
    episode: int
    frames: NDArray[np.uint8]
    advantage: NDArray[np.float64]
    threshold: NDArray[np.float64]
    indicator: NDArray[np.int8]
    source: str


@dataclass(frozen=True)
class Preview:
    """What was written: the film, the contact sheet beside it, frames of the film, the moments shown."""

    video: Path
    sheet: Path
    frames: int
    moments: tuple[Moment, ...]


Progress = Callable[[Sequence[str]], Iterable[str]]


def write_preview(
    dataset: Dataset,
    labels: LabelledFrames,
    out: Path,
    *,
    per_kind: int = 3,
    seconds: float = 2.0,
    progress: Progress = iter,
) -> Preview:
    """Write `out` (H.264, .mp4) and a contact sheet with the same name and .png.

    One page a task, one after the other: rows for the most positive, the borderline and the most negative frames,
    `per_kind` clips of up to `seconds` each, framed in the colour of the label of the frame that is shown. progress:
    wraps the iteration over the tasks. Raises LabelError when there is nothing to show or `out` is no .mp4.
    """
    if out.suffix.lower() != ".mp4":
        raise LabelError(f"preview: expected a file name that ends in .mp4, got {out}")
    fps = dataset.spec.control_hz
    moments = pick_moments(dataset, labels, per_kind=per_kind, clip=max(1, round(seconds * fps)))
    stills: list[NDArray[np.uint8]] = []

    def pages() -> Iterator[NDArray[np.uint8]]:
        for task in progress(list(dict.fromkeys(moment.task for moment in moments))):
            own = [moment for moment in moments if moment.task == task]
            shots = sorted(read_shots(dataset, labels, own), key=lambda shot: own.index(shot.moment))
            stills.append(draw_sheet(task, KINDS, shots, per_kind))
            for step in range(max(len(shot.frames) for shot in shots)):
                yield draw_page(task, KINDS, shots, per_kind, step)

    out.parent.mkdir(parents=True, exist_ok=True)
    sheet = out.with_suffix(".png")
    mark = uuid4().hex
    film = out.with_name(f".{out.name}.{mark}.tmp")
    picture = sheet.with_name(f".{sheet.name}.{mark}.tmp")
    try:
        count = encode_h264(film, pages(), fps)
        Image.fromarray(np.concatenate(stills)).save(picture, "PNG")
        picture.replace(sheet)
        film.replace(out)
    finally:  # Ctrl-C leaves no half a film
        for path in (film, picture):
            path.unlink(missing_ok=True)
    return Preview(out, sheet, count, tuple(moments))


def pick_moments(dataset: Dataset, labels: LabelledFrames, *, per_kind: int, clip: int) -> list[Moment]:
    """At most `per_kind` moments of every kind and task, whose clips of `clip` frames do not overlap within a kind.

    Most positive: the largest advantage above the threshold among positive frames; most negative: the lowest among
    negative frames; borderline: the smallest distance from the threshold. A frame that a rule labelled (a takeover, a
    failed episode) counts with its own advantage. Imported labels come without advantages: their positive and negative
    frames are a fixed draw, and none is borderline. Order: tasks as they come in the dataset, then KINDS.
    """
    if per_kind < 1:
        raise LabelError(f"preview: expected at least 1 clip of every kind, got {per_kind}")
    margin = labels.advantage - labels.threshold
    if len(margin) != dataset.frames:
        raise LabelError(f"preview: expected labels of {dataset.frames} frames, got {len(margin)}")
    known = np.isfinite(margin)
    margin = np.where(known, margin, np.random.default_rng(0).random(len(margin)))
    tasks = np.repeat(np.array([e.task for e in dataset.episodes], object), [len(e) for e in dataset.episodes])
    ranks = {
        KINDS[0]: (labels.indicator == conditioning.POSITIVE, -margin),
        KINDS[1]: (known & (labels.indicator != conditioning.NONE), np.abs(margin)),
        KINDS[2]: (labels.indicator == conditioning.NEGATIVE, margin),
    }
    found = [
        moment
        for task in dict.fromkeys(episode.task for episode in dataset.episodes)
        for kind, (allowed, rank) in ranks.items()
        for moment in _apart(dataset, kind, np.flatnonzero(allowed & (tasks == task)), rank, per_kind, clip)
    ]
    if not found:
        raise LabelError(
            "preview: expected at least one positive or negative frame, got labels that mark none; look at audit.html"
        )
    return found


def _apart(
    dataset: Dataset, kind: str, rows: NDArray[np.int64], rank: NDArray[np.float64], count: int, clip: int
) -> Iterator[Moment]:
    """The `count` rows of lowest rank whose clips do not overlap."""
    slices = rows_of(dataset)
    starts = np.array([part.start for part in slices])
    taken: list[tuple[int, int, int]] = []
    for row in rows[np.argsort(rank[rows], kind="stable")].tolist():
        if len(taken) == count:
            return
        place = int(np.searchsorted(starts, row, side="right")) - 1
        length = len(dataset.episodes[place])
        frame = row - slices[place].start
        start = min(max(0, frame - clip // 2), max(0, length - clip))
        stop = min(length, start + clip)
        if all(place != other or stop <= low or start >= high for other, low, high in taken):
            taken.append((place, start, stop))
            yield Moment(kind, dataset.episodes[place].task, place, frame, row, start, stop)


def read_shots(dataset: Dataset, labels: LabelledFrames, moments: Sequence[Moment]) -> Iterator[Shot]:
    """The moments with their pictures; every episode is decoded once and let go."""
    for place in dict.fromkeys(moment.place for moment in moments):
        episode = dataset.episodes[place]
        images = episode.images()
        for moment in (moment for moment in moments if moment.place == place):
            part = slice(moment.start, moment.stop)
            rows = slice(moment.row - moment.frame + moment.start, moment.row - moment.frame + moment.stop)
            views = np.concatenate([_small(frames[part]) for frames in images.values()], axis=2)
            yield Shot(
                moment, episode.index, views, labels.advantage[rows], labels.threshold[rows],
                labels.indicator[rows], str(labels.source[moment.row]),
            )  # fmt: skip


def _small(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames [L, H, W, 3] at the height they are shown in: a clip of full frames would fill the memory."""
    width = max(1, round(frames.shape[2] * VIEW / frames.shape[1]))
    return np.stack([np.asarray(Image.fromarray(f).resize((width, VIEW), Image.Resampling.BICUBIC)) for f in frames])
