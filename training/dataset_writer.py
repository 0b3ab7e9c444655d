"""Writes LeRobot v3.0 datasets with images in the parquet files, without importing lerobot: seconds instead of minutes.

The files are those that LeRobot's own writer makes (a test compares the two); statistics are exact where LeRobot's are
estimated from histograms.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recap_client.images import encode_png
from recap_client.spec import RobotSpec
from training.columns import DatasetError
from training.lerobot_files import IMAGES, SPEC_FILE, features, whole_rate

_QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)
_FILE_MB = 100
_INDEX = ("timestamp", "frame_index", "episode_index", "index", "task_index")
Stats = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class EpisodeData:
    """One episode of T frames to write: state [T, S], action [T, A], images camera -> uint8 [T, H, W, 3], intervention
    bool [T], reward [T]."""

    task: str
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    images: Mapping[str, NDArray[np.uint8]]
    intervention: NDArray[np.bool_]
    demonstration: bool
    success: bool
    reward: NDArray[np.float64]

    def columns(self) -> dict[str, NDArray[Any]]:
        """All features but images, each [T] or [T, D]."""
        steps = len(self.state)
        return {
            "observation.state": np.asarray(self.state, np.float32),
            "action": np.asarray(self.action, np.float32),
            "intervention": self.intervention.astype(np.int64),
            "success": np.full(steps, int(self.success), np.int64),
            "demonstration": np.full(steps, int(self.demonstration), np.int64),
            "next.reward": self.reward.astype(np.float32),
            "next.done": np.arange(steps) == steps - 1,
        }


class DatasetWriter:
    """Writes episodes into the folder `root`, which must exist and be empty; use as a context manager."""

    def __init__(self, root: Path, spec: RobotSpec) -> None:
        self._root, self._spec, self._fps = root, spec, whole_rate(spec)
        self._features = {
            **features(spec),
            **{name: _scalar("float32" if name == "timestamp" else "int64") for name in _INDEX},
        }
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._stats: list[dict[str, Stats]] = []
        self._frames = self._file = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, episode: EpisodeData) -> None:
        """Write one episode: one row group of a data file."""
        steps, number = len(episode.state), len(self._episodes)
        task = self._tasks.setdefault(episode.task, len(self._tasks))
        columns = episode.columns() | {
            "timestamp": (np.arange(steps) / self._fps).astype(np.float32),
            "frame_index": np.arange(steps),
            "episode_index": np.full(steps, number),
            "index": np.arange(self._frames, self._frames + steps),
            "task_index": np.full(steps, task),
        }
        images = {IMAGES + camera.name: episode.images[camera.name] for camera in self._spec.cameras}
        table = pa.table([self._cells(name, columns, images) for name in self._features], schema=self._schema())
        self._open().write_table(table, row_group_size=steps)
        self._episodes.append({
            "episode_index": number, "tasks": [episode.task], "length": steps, "data/chunk_index": 0,
            "data/file_index": self._file, "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + steps,
        })  # fmt: skip
        self._stats.append({name: vector_stats(values) for name, values in columns.items()}
                           | {name: image_stats(frames) for name, frames in images.items()})  # fmt: skip
        self._frames += steps

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if kind is None:
            self._finish()

    def _cells(
        self, name: str, columns: Mapping[str, NDArray[Any]], images: Mapping[str, NDArray[np.uint8]]
    ) -> pa.Array:
        if name in images:
            encoded = [encode_png(frame) for frame in images[name]]
            paths = [f"frame-{row:06d}.png" for row in range(len(encoded))]
            return pa.StructArray.from_arrays([pa.array(encoded, pa.binary()), pa.array(paths)], ["bytes", "path"])
        values = columns[name]
        if values.ndim == 1:
            return pa.array(values)
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    def _schema(self) -> pa.Schema:
        fields: list[pa.Field] = []
        known: dict[str, Any] = {}
        for name, feature in self._features.items():
            scalar = pa.bool_() if feature["dtype"] == "bool" else None
            if feature["dtype"] == "image":
                kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
                known[name] = {"_type": "Image"}
            else:
                scalar = scalar or pa.type_for_alias(feature["dtype"])
                value = {"dtype": feature["dtype"], "_type": "Value"}
                vector = name in ("observation.state", "action")
                kind = pa.list_(scalar, feature["shape"][0]) if vector else scalar
                known[name] = {"feature": value, "length": feature["shape"][0], "_type": "List"} if vector else value
            fields.append(pa.field(name, kind))
        return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": known}})})

    def _open(self) -> pq.ParquetWriter:
        """The current data file; a new one when it has grown beyond LeRobot's limit."""
        path = self._root / "data" / "chunk-000" / f"file-{self._file:03d}.parquet"
        if self._writer is not None and path.stat().st_size > _FILE_MB * 2**20:
            self._writer.close()
            self._writer = None
            self._file += 1
            path = path.with_name(f"file-{self._file:03d}.parquet")
        if self._writer is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(path, self._schema(), compression="snappy")
        return self._writer

    def _finish(self) -> None:
        if not self._episodes:
            raise DatasetError(f"{self._root}: expected at least one episode, got none")
        meta = self._root / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        here = {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        rows = [row | _flat(stats) | here for row, stats in zip(self._episodes, self._stats, strict=True)]
        pq.write_table(pa.Table.from_pylist(rows), meta / "episodes" / "chunk-000" / "file-000.parquet")
        import pandas  # LeRobot keeps the instruction in a pandas index

        index = pandas.Index(list(self._tasks), name="task")
        pandas.DataFrame({"task_index": list(self._tasks.values())}, index=index).to_parquet(meta / "tasks.parquet")
        total = {name: aggregate([stats[name] for stats in self._stats]) for name in self._stats[0]}
        _write_json(meta / "stats.json", {name: {key: value.tolist() for key, value in stats.items()}
                                          for name, stats in total.items()})  # fmt: skip
        _write_json(meta / "info.json", self._info())
        _write_json(self._root / SPEC_FILE, self._spec.to_json())

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": "v3.0", "fps": self._fps, "features": self._features,
            "total_episodes": len(self._episodes), "total_frames": self._frames, "total_tasks": len(self._tasks),
            "chunks_size": 1000, "data_files_size_in_mb": _FILE_MB, "video_files_size_in_mb": 200,
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", "video_path": None,
            "robot_type": self._spec.robot, "splits": {"train": f"0:{len(self._episodes)}"},
        }  # fmt: skip


def vector_stats(values: NDArray[Any]) -> Stats:
    """Statistics of [T] or [T, D], each float64 [D] (D = 1 for [T]); count int64 [1]."""
    data = values.reshape(len(values), -1).astype(np.float64)
    quantiles = np.quantile(data, _QUANTILES, axis=0, method="inverted_cdf")
    stats = {"min": data.min(0), "max": data.max(0), "mean": data.mean(0), "std": data.std(0),
             "count": np.array([len(data)])}  # fmt: skip
    return stats | {f"q{round(q * 100):02d}": row for q, row in zip(_QUANTILES, quantiles, strict=True)}


def image_stats(frames: NDArray[np.uint8]) -> Stats:
    """Statistics of uint8 [T, H, W, 3] per channel in [0, 1], each float64 [3, 1, 1]; count int64 [1] (frames)."""
    counts = np.stack([np.bincount(frames[..., channel].reshape(-1), minlength=256) for channel in range(3)])
    levels, total = np.arange(256) / 255, counts.sum(1)
    mean = counts @ levels / total
    stats = {
        "min": np.array([levels[np.flatnonzero(row)[0]] for row in counts]),
        "max": np.array([levels[np.flatnonzero(row)[-1]] for row in counts]),
        "mean": mean, "std": np.sqrt(np.maximum(0, counts @ levels**2 / total - mean**2)),
    }  # fmt: skip
    below = counts.cumsum(1)
    for q in _QUANTILES:
        stats[f"q{round(q * 100):02d}"] = levels[(below < q * total[:, None]).sum(1)]
    return {key: value.reshape(3, 1, 1) for key, value in stats.items()} | {"count": np.array([len(frames)])}


def aggregate(parts: list[Stats]) -> Stats:
    """Statistics of all episodes from those of each, as LeRobot aggregates them (quantiles: weighted mean)."""
    count = np.array([part["count"][0] for part in parts], np.float64)

    def weighted(values: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(np.tensordot(count / count.sum(), values, 1))

    stacked = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
    mean = weighted(stacked["mean"])
    result = {key: weighted(values) for key, values in stacked.items() if key[0] == "q"}
    std = np.sqrt(weighted(stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2))
    return {"min": stacked["min"].min(0), "max": stacked["max"].max(0), "mean": mean, "std": std,
            "count": np.array([int(count.sum())]), **result}  # fmt: skip


def _flat(stats: Mapping[str, Stats]) -> dict[str, Any]:
    """Statistics as columns of the episode table."""
    return {f"stats/{name}/{key}": value.tolist() for name, item in stats.items() for key, value in item.items()}


def _scalar(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "shape": (1,), "names": None}


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=4) + "\n")
