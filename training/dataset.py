"""LeRobot datasets (v3.0) as episodes, and back. The only file that imports lerobot, and only where it must:
for video frames and conversion from v2.1. Images are read, and written by `dataset_writer`, with pyarrow alone.

A dataset is never modified. `open_dataset` checks it once and reads everything but the images into memory.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from recap_client.spec import RobotSpec
from training import columns, lerobot_files
from training.columns import DatasetError
from training.lerobot_files import IMAGES, SPEC_FILE

if TYPE_CHECKING:
    from training.dataset_writer import EpisodeData

Images = dict[str, NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode of T frames. state float32 [T, S], action float32 [T, A] in physical units; intervention bool [T];
    reward float32 [T] or None as recorded; success None where the dataset does not say; extra: further per-frame
    columns [T] under their own names (`columns.extra_columns`)."""

    index: int
    task: str
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    intervention: NDArray[np.bool_]
    demonstration: bool
    success: bool | None
    reward: NDArray[np.float32] | None
    fps: float
    extra: Mapping[str, NDArray[Any]]
    decode: Callable[[], Images]

    def __len__(self) -> int:
        return len(self.state)

    def images(self) -> Images:
        """Every camera's frames, uint8 [T, H, W, 3]; decoded at each call and not kept."""
        return self.decode()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Episodes in order. hash: identifies the content; labels record it and are refused for another dataset."""

    root: Path
    spec: RobotSpec
    hash: str
    episodes: tuple[Episode, ...]

    @property
    def frames(self) -> int:
        return sum(len(episode) for episode in self.episodes)

    def keys(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(episode_index, frame_index) of every frame in dataset order, int64 [F] each."""
        lengths = [len(episode) for episode in self.episodes]
        index = np.repeat(np.array([episode.index for episode in self.episodes], np.int64), lengths)
        return index, np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])


def open_dataset(root: Path | str) -> Dataset:
    """Read and check a dataset folder. Raises DatasetError naming episode, column, expected and got."""
    root = Path(root)
    info = lerobot_files.read_info(root)
    pictures = {
        name: feature["dtype"]
        for name, feature in info["features"].items()
        if feature["dtype"] in ("image", "video") and name.startswith(IMAGES)
    }
    files = lerobot_files.data_files(root)
    data = lerobot_files.read_columns(files, but=pictures)
    table = lerobot_files.read_episodes(root)
    starts = _episode_starts(root, data)
    spec = _spec(root, info)
    _require_vectors(root, data, spec)
    _require_cameras(root, spec, pictures, lerobot_files.column_names(files))
    stops = [*starts[1:].tolist(), len(data["episode_index"])]
    outcomes = _outcomes(data, table, starts)
    tasks = lerobot_files.read_tasks(root)
    images = lerobot_files.ImageTable(files)
    human = columns.flags("intervention", data["intervention"]) if "intervention" in data else None
    shown = columns.flags("demonstration", data["demonstration"]) if "demonstration" in data else None
    reward = next((data[name] for name in columns.REWARD_COLUMNS if name in data), None)
    episodes = []
    for number, (start, stop) in enumerate(zip(starts.tolist(), stops, strict=True)):
        rows = slice(start, stop)
        episodes.append(
            Episode(
                index=int(data["episode_index"][start]),
                task=_task(root, tasks, int(data["task_index"][start])),
                state=data["observation.state"][rows],
                action=data["action"][rows],
                intervention=np.zeros(stop - start, bool) if human is None else human[rows],
                # nobody takes over from himself: without either column the episodes are taken as a human's
                demonstration=bool(shown[start]) if shown is not None else human is None,
                success=outcomes[number],
                reward=None if reward is None else reward[rows].astype(np.float32),
                fps=float(info["fps"]),
                extra={name: data[name][rows] for name in columns.extra_columns(data)},
                decode=_Decoder(root, info, pictures, images, table, number, start, stop),
            )
        )
    return Dataset(root, spec, lerobot_files.dataset_hash(root, info), tuple(episodes))


@dataclass(frozen=True)
class _Decoder:
    """Reads the images of one episode when called."""

    root: Path
    info: Mapping[str, Any]
    pictures: Mapping[str, str]
    images: Any
    table: Mapping[str, NDArray[Any]]
    number: int
    start: int
    stop: int

    def __call__(self) -> Images:
        return {
            name.removeprefix(IMAGES): self.images.read(name, self.start, self.stop)
            if kind == "image"
            else self._video(name)
            for name, kind in self.pictures.items()
        }

    def _video(self, name: str) -> NDArray[np.uint8]:
        def cell(what: str) -> Any:
            return self.table[f"videos/{name}/{what}"][self.number]

        path = self.root / self.info["video_path"].format(
            video_key=name, chunk_index=int(cell("chunk_index")), file_index=int(cell("file_index"))
        )
        if not path.is_file():
            raise DatasetError(f"{path}: expected the video of {name}, got no such file; see `recap data check`")
        fps = float(self.info["fps"])
        times = [float(cell("from_timestamp")) + frame / fps for frame in range(self.stop - self.start)]
        from lerobot.datasets.video_utils import decode_video_frames

        frames = decode_video_frames(path, times, tolerance_s=0.5 / fps, return_uint8=True)
        return np.ascontiguousarray(frames.numpy().transpose(0, 2, 3, 1))


def _episode_starts(root: Path, data: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    missing = [
        name
        for name in ("episode_index", "frame_index", "task_index", "observation.state", "action")
        if name not in data
    ]
    if missing:
        raise DatasetError(f"{root}: expected columns {missing}, got {sorted(data)}")
    index, frame = data["episode_index"], data["frame_index"]
    starts = np.flatnonzero(np.r_[True, np.diff(index) != 0])
    if len(np.unique(index)) != len(starts):
        raise DatasetError(f"{root}: expected the frames of an episode in one piece, got scattered frames")
    lengths = np.diff(np.r_[starts, len(index)])
    if not np.array_equal(frame, np.concatenate([np.arange(length) for length in lengths])):
        raise DatasetError(f"{root}: frame_index: expected 0, 1, 2 ... within every episode, got gaps")
    return starts


def _outcomes(
    data: Mapping[str, NDArray[Any]], table: Mapping[str, NDArray[Any]], starts: NDArray[np.int64]
) -> list[bool | None]:
    found: dict[str, list[bool | None]] = {}
    for name in columns.OUTCOME_COLUMNS:
        if name in data:
            found[name] = columns.frame_outcomes(name, data[name], starts)
        if name in table and len(table[name]) == len(starts):
            found[f"meta/episodes {name}"] = columns.episode_outcomes(name, table[name])
    return columns.agree(found, len(starts))


def _task(root: Path, tasks: Mapping[int, str], index: int) -> str:
    if index not in tasks:
        raise DatasetError(f"{root}: task_index {index}: expected one of {sorted(tasks)} (meta/tasks.parquet)")
    return tasks[index]


def _require_cameras(root: Path, spec: RobotSpec, pictures: Mapping[str, str], stored: set[str]) -> None:
    for camera in spec.camera_names:
        kind = pictures.get(IMAGES + camera)
        if kind is None or (kind == "image" and IMAGES + camera not in stored):
            where = f"{SPEC_FILE}: expected frames of camera" if kind is None else "data: expected images of camera"
            got = sorted(name.removeprefix(IMAGES) for name in pictures if name in stored or pictures[name] == "video")
            raise DatasetError(f"{root}: {where} {camera!r}, got cameras {got}; see `recap data check`")


def _require_vectors(root: Path, data: dict[str, NDArray[Any]], spec: RobotSpec) -> None:
    for name, dims in (("observation.state", spec.state), ("action", spec.action)):
        values = data[name].reshape(len(data[name]), -1)
        if values.shape[1] != len(dims) or values.dtype == object:
            raise DatasetError(
                f"{root}: {name}: expected {len(dims)} numbers a frame (the spec's), got shape "
                f"{list(values.shape)} of {values.dtype}"
            )
        data[name] = np.ascontiguousarray(values, np.float32)
        columns.require_finite(
            name, data[name], data["episode_index"], data["frame_index"], tuple(dim.name for dim in dims)
        )


def _spec(root: Path, info: Mapping[str, Any]) -> RobotSpec:
    path = root / SPEC_FILE
    if path.is_file():
        return RobotSpec.from_json(json.loads(path.read_text()))
    return lerobot_files.derive_spec(root, info)


class VideoDatasetWriter:
    """`DatasetWriter` with cameras as video files, by LeRobot's own writer."""

    def __init__(self, root: Path, spec: RobotSpec) -> None:
        import datasets
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        datasets.disable_progress_bars()
        root.rmdir()  # LeRobot insists on making it
        self._root, self._spec = root, spec
        self._data = LeRobotDataset.create(
            f"local/{root.name.strip('.')}",
            fps=lerobot_files.whole_rate(spec),
            features=lerobot_files.features(spec, video=True),
            root=root,
            robot_type=spec.robot,
            use_videos=True,
            image_writer_threads=2,
        )

    def add(self, episode: "EpisodeData") -> None:
        """Write one episode."""
        columns = episode.columns()
        for row in range(len(episode.state)):
            frame = {name: np.atleast_1d(values[row]) for name, values in columns.items()}
            frame |= {IMAGES + camera.name: episode.images[camera.name][row] for camera in self._spec.cameras}
            self._data.add_frame({**frame, "task": episode.task})
        self._data.save_episode()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.finalize()
        if kind is None:
            (self._root / SPEC_FILE).write_text(json.dumps(self._spec.to_json(), indent=1) + "\n")
            shutil.rmtree(self._root / "images", ignore_errors=True)


def convert_v21(source: Path, out: Path) -> None:
    """A v3.0 copy of the v2.1 dataset `source` at `out` (must not exist), by LeRobot's converter."""
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        copy = Path(temporary) / "dataset"
        shutil.copytree(source, copy)
        convert_dataset(f"local/{out.name}", root=copy, push_to_hub=False)
        copy.rename(out)
