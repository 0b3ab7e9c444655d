"""Episodes as a Rerun recording (.rrd): every frame of every camera, state, action and labels on one time axis."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from recap_client.images import encode_jpeg
from training.dataset import Dataset, Episode
from training.view import Chosen, Progress, ViewError, rows_of, title
from training.view_chart import Tracks


def require_rerun() -> None:
    """Raises ViewError when the package is missing. Called before any work is done."""
    if find_spec("rerun") is None:
        raise ViewError(
            "--rerun: expected the Python package rerun-sdk, got none; install it with "
            "`pip install 'recap-stack[view]'`, or leave --rerun out: the page of --out needs nothing"
        )


def write_rerun(
    dataset: Dataset, tracks: Tracks, chosen: Sequence[Chosen], out: Path, progress: Progress = iter
) -> int:
    """Write the episodes to `out` (atomically) and return the number of frames.

    Timelines: `frame` (in the episode) and `time` [s]. Entities below `episode_<index>/`: `cameras/<name>` (JPEG),
    `state/<name>`, `action/<name>`, `value`, `return`, `advantage`, `threshold`, `indicator`, `intervention`.
    """
    require_rerun()
    import rerun as rr

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{uuid4().hex}.tmp")
    rows, frames = rows_of(dataset), 0
    try:
        with rr.RecordingStream("recap data view") as recording:
            recording.save(temporary)
            for item in progress(chosen):
                episode = dataset.episodes[item.place]
                _episode(rr, recording, dataset, episode, tracks.part(rows[item.place]))
                frames += len(episode)
            recording.flush()
            recording.disconnect()
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return frames


def _episode(rr: Any, recording: Any, dataset: Dataset, episode: Episode, tracks: Tracks) -> None:
    root = f"episode_{episode.index:04d}"
    recording.log(f"{root}/about", rr.TextDocument(title(episode)), static=True)
    numbers = dict(_numbers(dataset, episode, tracks))
    images = episode.images()
    for frame in range(len(episode)):
        recording.set_time("frame", sequence=frame)
        recording.set_time("time", duration=frame / episode.fps)
        for camera, pictures in images.items():
            jpeg = rr.EncodedImage(contents=encode_jpeg(pictures[frame]), media_type="image/jpeg")
            recording.log(f"{root}/cameras/{camera}", jpeg)
        for name, column in numbers.items():
            recording.log(f"{root}/{name}", rr.Scalars(float(column[frame])))


def _numbers(dataset: Dataset, episode: Episode, tracks: Tracks) -> Iterable[tuple[str, Any]]:
    """Name of the entity -> column [T]."""
    states, actions = [dim.name for dim in dataset.spec.state], [dim.name for dim in dataset.spec.action]
    for group, names, values in (("state", states, episode.state), ("action", actions, episode.action)):
        for number, name in enumerate(names):
            yield f"{group}/{name.replace('/', '_')}", values[:, number]
    known = {"value": tracks.value, "return": tracks.returns, "advantage": tracks.advantage,
             "threshold": tracks.threshold, "indicator": tracks.indicator}  # fmt: skip
    yield from ((name, column) for name, column in known.items() if column is not None)
    yield "intervention", np.asarray(episode.intervention, np.float64)
