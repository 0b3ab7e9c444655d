"""Writes the files of a merged LeRobot v3.0 dataset: frames as they stand in the sources but for what is counted anew
(episode, frame and task indices), images and metadata. Videos: `data_merge_video`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recap_client.images import encode_png
from recap_client.spec import RobotSpec
from training.columns import DatasetError
from training.data_fill import fill
from training.data_merge_video import VIDEO_PATH, Part, Videos
from training.dataset import Images
from training.dataset_writer import Stats, aggregate, image_stats, vector_stats
from training.lerobot_files import IMAGES, episode_files

_FILE_MB = 100
_CHUNK = 1000
_KEYS = ("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99")
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class MergedWriter:
    """Writes episodes into the folder `root`, which must exist and be empty; use as a context manager.

    columns: frame column -> arrow type; cameras: feature -> image or video; infos: meta/info.json of the sources."""

    def __init__(
        self,
        root: Path,
        columns: Mapping[str, pa.DataType],
        cameras: Mapping[str, str],
        infos: Sequence[Mapping[str, Any]],
        spec: RobotSpec,
    ) -> None:
        self._root, self._cameras, self._infos = root, cameras, infos
        images = {name: _IMAGE for name, kind in cameras.items() if kind == "image"}
        self._types = {**columns, **images, **dict.fromkeys(("episode_index", "index", "task_index"), pa.int64())}
        self._features = _features(self._types, cameras, infos)
        self._schema = _schema(self._types, self._features)
        self._videos = Videos(root, cameras, spec)
        self._rows: list[dict[str, Any]] = []
        self._stats: list[dict[str, Stats]] = []
        self._stored = _StoredStats()
        self._tasks: dict[str, int] = {}
        self._frames = self._file = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, part: Part) -> None:
        """Write one episode: one row group of a data file."""
        steps, number = len(part.episode), len(self._rows)
        counted = {
            "episode_index": np.full(steps, number),
            "index": np.arange(self._frames, self._frames + steps),
            "task_index": np.full(steps, self._tasks.setdefault(part.episode.task, len(self._tasks))),
        }
        stored = self._stored.of(part)
        changed = any(part.kind(name) != kind for name, kind in self._cameras.items())
        frames = part.episode.images() if changed or self._cameras.keys() - stored.keys() else {}
        cells = [pa.array(counted[n]) if n in counted else _cells(n, kind, part, frames)
                 for n, kind in self._types.items()]  # fmt: skip
        table = pa.table(cells, schema=self._schema)
        self._open().write_table(table, row_group_size=steps)
        self._videos.add(number, part, frames)
        self._rows.append({
            "episode_index": number, "tasks": [part.episode.task], "length": steps, "data/chunk_index":
            self._file // _CHUNK, "data/file_index": self._file % _CHUNK, "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + steps, **part.whole,
        })  # fmt: skip
        pictures = {n: stored.get(n) or image_stats(frames[n.removeprefix(IMAGES)]) for n in self._cameras}
        self._stats.append(_column_stats(table, self._cameras) | pictures)
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

    def _open(self) -> pq.ParquetWriter:
        """The current data file; a new one when it has grown beyond LeRobot's limit."""
        path = self._data_file()
        if self._writer is not None and path.stat().st_size > _FILE_MB * 2**20:
            self._writer.close()
            self._writer = None
            self._file += 1
            path = self._data_file()
        if self._writer is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(path, self._schema, compression="snappy")
        return self._writer

    def _data_file(self) -> Path:
        return self._root / _DATA_PATH.format(chunk_index=self._file // _CHUNK, file_index=self._file % _CHUNK)

    def _finish(self) -> None:
        import pandas  # LeRobot keeps the instruction in a pandas index

        meta = self._root / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        here = {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        videos, encoded = self._videos.finish()
        names = sorted({name for stats in self._stats for name in stats})
        rows = [row | videos.get(number, {}) | _flat(stats, names) | here
                for number, (row, stats) in enumerate(zip(self._rows, self._stats, strict=True))]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), meta / "episodes" / "chunk-000" / "file-000.parquet")
        index = pandas.Index(list(self._tasks), name="task")
        pandas.DataFrame({"task_index": list(self._tasks.values())}, index=index).to_parquet(meta / "tasks.parquet")
        total = {name: aggregate([stats[name] for stats in self._stats if name in stats]) for name in names}
        _write_json(meta / "stats.json", {name: {key: value.tolist() for key, value in stats.items()}
                                          for name, stats in total.items()})  # fmt: skip
        _write_json(meta / "info.json", self._info(encoded))

    def _info(self, encoded: Mapping[str, Any]) -> dict[str, Any]:
        features = {name: {**feature, **({"info": encoded[name]} if encoded.get(name) else {})}
                    for name, feature in self._features.items()}  # fmt: skip
        return {
            **self._infos[0], "codebase_version": "v3.0", "features": features,
            "total_episodes": len(self._rows), "total_frames": self._frames, "total_tasks": len(self._tasks),
            "chunks_size": _CHUNK, "data_files_size_in_mb": _FILE_MB, "video_files_size_in_mb": 200,
            "data_path": _DATA_PATH, "splits": {"train": f"0:{len(self._rows)}"},
            "video_path": VIDEO_PATH if "video" in self._cameras.values() else None,
        }  # fmt: skip


class _StoredStats:
    """Statistics of the cameras as the sources' episode tables hold them, so that no image has to be decoded."""

    def __init__(self) -> None:
        self._root: Path | None = None
        self._table: pa.Table | None = None

    def of(self, part: Part) -> dict[str, Stats]:
        """Camera feature -> statistics of the episode; only those that are complete."""
        if self._root != part.root:
            files = [pq.ParquetFile(path) for path in episode_files(part.root)]
            names = [n for n in files[0].schema_arrow.names if n.startswith(f"stats/{IMAGES}")]
            self._root, self._table = part.root, pa.concat_tables([file.read(names) for file in files])
        found: dict[str, Stats] = {}
        if self._table is None or len(self._table) <= part.number:
            return found
        for column, value in self._table.slice(part.number, 1).to_pylist()[0].items():
            if value is not None:
                _, name, key = column.split("/")
                found.setdefault(name, {})[key] = np.array(value)
        return {name: stats for name, stats in found.items() if stats.keys() >= set(_KEYS)}


def _cells(name: str, kind: pa.DataType, part: Part, frames: Images) -> pa.Array | pa.ChunkedArray:
    """A column of one episode in the merged type: copied, filled in, or images encoded from video."""
    if name in part.rows.column_names:
        column = part.rows.column(name).combine_chunks()
        if kind == _IMAGE and pc.struct_field(column, "bytes").null_count:
            raise DatasetError(f"{part.root}: episode {part.episode.index}: {name}: expected images in the data files, "
                               "got empty cells (a path elsewhere?)")  # fmt: skip
        return column if column.type == kind else column.cast(kind)
    if kind == _IMAGE:
        encoded = [encode_png(frame) for frame in frames[name.removeprefix(IMAGES)]]
        paths = [f"frame-{row:06d}.png" for row in range(len(encoded))]
        return pa.StructArray.from_arrays([pa.array(encoded, pa.binary()), pa.array(paths)], ["bytes", "path"])
    return fill(name, kind, part.episode)


def _features(
    types: Mapping[str, pa.DataType], cameras: Mapping[str, str], infos: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """LeRobot features: as the first source that has one states it, or from the arrow type."""
    result: dict[str, dict[str, Any]] = {}
    for name in [*(n for n in infos[0]["features"] if n in types or n in cameras), *types, *cameras]:
        stated = next((info["features"][name] for info in infos if name in info["features"]), None)
        if name in cameras:
            assert stated is not None
            result[name] = {**{k: v for k, v in stated.items() if k != "info"}, "dtype": cameras[name]}
        elif stated is not None:
            result[name] = dict(stated)
        else:
            kind = types[name]
            size = kind.list_size if pa.types.is_fixed_size_list(kind) else 1
            result[name] = {"dtype": _value_type(kind), "shape": [size], "names": None}
    return result


def _schema(types: Mapping[str, pa.DataType], features: Mapping[str, Mapping[str, Any]]) -> pa.Schema:
    """Arrow schema with what Hugging Face's reader wants to know of the columns."""
    known: dict[str, Any] = {}
    for name, kind in types.items():
        value = {"dtype": _value_type(kind), "_type": "Value"}
        if features[name]["dtype"] == "image":
            known[name] = {"_type": "Image"}
        elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            length = kind.list_size if pa.types.is_fixed_size_list(kind) else -1
            known[name] = {"feature": value, "length": length, "_type": "List"}
        elif not pa.types.is_nested(kind):
            known[name] = value
    described = {"huggingface": json.dumps({"info": {"features": known}})} if known.keys() == types.keys() else {}
    return pa.schema([pa.field(name, kind) for name, kind in types.items()], described)


def _value_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _value_type(kind.value_type)
    return {"float": "float32", "double": "float64", "large_string": "string"}.get(str(kind), str(kind))


def _column_stats(table: pa.Table, but: Mapping[str, str]) -> dict[str, Stats]:
    """Statistics of every numeric column over its finite rows; a column without any has none."""
    result = {}
    for name in table.column_names:
        column = table.column(name)
        numeric = not _value_type(column.type).startswith(("string", "struct", "binary", "null"))
        if name in but or not numeric or pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            continue
        column = column.drop_null()
        flat = column.combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            values = flat.flatten().to_numpy(zero_copy_only=False).reshape(len(flat), -1).astype(np.float64)
        else:
            values = flat.to_numpy(zero_copy_only=False).astype(np.float64)[:, None]
        values = values[np.isfinite(values).all(1)]
        if len(values):
            result[name] = vector_stats(values)
    return result


def _flat(stats: Mapping[str, Stats], names: Sequence[str]) -> dict[str, Any]:
    """Statistics as columns of the episode table, null for what an episode has none of."""
    return {
        f"stats/{name}/{key}": stats[name][key].tolist() if name in stats else None for name in names for key in _KEYS
    }


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=4) + "\n")
