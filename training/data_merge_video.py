"""The videos of a merged dataset: whole files copied from the sources, or episodes encoded by LeRobot's writer."""

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recap_client.spec import RobotSpec
from training.columns import DatasetError
from training.dataset import Episode, Images, VideoDatasetWriter
from training.dataset_writer import EpisodeData
from training.lerobot_files import IMAGES, read_episodes, read_info

VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_CHUNK = 1000
_CELLS = ("from_timestamp", "to_timestamp")


@dataclass(frozen=True, eq=False)
class Part:
    """An episode to write. number: its position in the source; rows: its frames without images that are to be encoded;
    table: the source's episode table; whole: further columns of the merged episode table."""

    root: Path
    info: Mapping[str, Any]
    episode: Episode
    number: int
    rows: pa.Table
    table: Mapping[str, NDArray[Any]]
    whole: Mapping[str, Any]

    def kind(self, camera: str) -> str:
        """How the source stores a camera feature: image or video."""
        return str(self.info["features"][camera]["dtype"])


@dataclass
class _Encoder:
    """Episodes of the sources that store the same cameras as images. numbers: of these episodes in the merged set."""

    root: Path
    writer: VideoDatasetWriter
    numbers: list[int] = field(default_factory=list)


class Videos:
    """Collects the episodes' videos; `finish` returns where they are."""

    def __init__(self, root: Path, cameras: Mapping[str, str], spec: RobotSpec) -> None:
        self._root, self._spec = root, spec
        self._names = [name for name, kind in cameras.items() if kind == "video"]
        self._encoders: dict[tuple[str, ...], _Encoder] = {}
        self._copied: dict[Path, tuple[int, int]] = {}
        self._count: Counter[str] = Counter()
        self._cells: dict[int, dict[str, Any]] = {}
        self._encodings: dict[str, list[Any]] = {}

    def add(self, number: int, part: Part, frames: Images) -> None:
        """Copy or encode the videos of episode `number` of the merged dataset."""
        ready = [name for name in self._names if part.kind(name) == "video"]
        self._copy(number, part.root, part.info, part.table, part.number, ready)
        due = tuple(name for name in self._names if name not in ready)
        if due:
            encoder = self._encoders.get(due) or self._encoders.setdefault(due, self._start(due))
            encoder.writer.add(
                _pictures_only(part, {n.removeprefix(IMAGES): frames[n.removeprefix(IMAGES)] for n in due})
            )
            encoder.numbers.append(number)

    def finish(self) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
        """(episode -> its cells of the episode table, camera -> its encoding where it is the same everywhere)."""
        for names, encoder in self._encoders.items():
            encoder.writer.__exit__(None, None, None)
            info, table = read_info(encoder.root), read_episodes(encoder.root)
            for row, number in enumerate(encoder.numbers):
                self._copy(number, encoder.root, info, table, row, list(names))
            shutil.rmtree(encoder.root)
        same = {name: found[0] for name, found in self._encodings.items() if all(f == found[0] for f in found)}
        return self._cells, same

    def _start(self, names: tuple[str, ...]) -> _Encoder:
        root = self._root / f"encoded-{len(self._encoders)}"
        root.mkdir()
        kept = tuple(camera for camera in self._spec.cameras if IMAGES + camera.name in names)
        return _Encoder(root, VideoDatasetWriter(root, replace(self._spec, cameras=kept)))

    def _copy(
        self, number: int, root: Path, info: Mapping[str, Any], table: Mapping[str, NDArray[Any]], row: int,
        names: list[str],
    ) -> None:  # fmt: skip
        for name in names:
            chunk, file = (int(table[f"videos/{name}/{part}_index"][row]) for part in ("chunk", "file"))
            path = root / info["video_path"].format(video_key=name, chunk_index=chunk, file_index=file)
            if path not in self._copied:
                self._copied[path] = divmod(self._count[name], _CHUNK)
                self._count[name] += 1
                target = self._root / VIDEO_PATH.format(
                    video_key=name, chunk_index=self._copied[path][0], file_index=self._copied[path][1]
                )
                if not path.is_file():
                    raise DatasetError(f"{path}: expected the video of {name}, got no such file: `recap data check`")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                self._encodings.setdefault(name, []).append(info["features"][name].get("info"))
            place = dict(zip(("chunk_index", "file_index"), self._copied[path], strict=True))
            times = {cell: float(table[f"videos/{name}/{cell}"][row]) for cell in _CELLS}
            self._cells.setdefault(number, {}).update(
                {f"videos/{name}/{key}": value for key, value in (place | times).items()}
            )


def _pictures_only(part: Part, images: Images) -> EpisodeData:
    """For LeRobot's writer, of whose output only the videos are kept."""
    steps = len(part.episode)
    return EpisodeData(
        part.episode.task, part.episode.state, part.episode.action, images, np.zeros(steps, bool), False, False,
        np.zeros(steps),
    )  # fmt: skip
