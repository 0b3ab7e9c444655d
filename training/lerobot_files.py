"""The parquet files of a LeRobot v3.0 dataset as numpy columns, and its images as pixels, without lerobot.

Training reads every frame of every camera, so images are decoded straight from the files' bytes, several at a time.
"""

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim
from recap_model.manifest import NAME as MANIFEST
from recap_model.manifest import read_manifest
from training.columns import DatasetError

IMAGES = "observation.images."
SPEC_FILE = Path("meta") / "recap_spec.json"
_DECODERS = 4


def read_info(root: Path) -> dict[str, Any]:
    """meta/info.json; refuses a folder without one and any version but 3.0."""
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise DatasetError(f"{root}: expected a LeRobot dataset (a folder with meta/info.json), got none")
    info: dict[str, Any] = json.loads(path.read_text())
    version = str(info.get("codebase_version", "none"))
    if version == "v2.1":
        raise DatasetError(
            f"{root}: expected a LeRobot v3.0 dataset, got v2.1; convert a copy of it with "
            f"`recap ingest --lerobot {root} --out NEW_FOLDER`"
        )
    if not version.startswith("v3."):
        raise DatasetError(f"{root}: codebase_version: expected v3.0 (or v2.1, to be converted), got {version}")
    return info


def data_files(root: Path) -> list[Path]:
    """The files that hold frames, in frame order."""
    files = sorted((root / "data").glob("chunk-*/file-*.parquet"))
    if not files:
        raise DatasetError(f"{root}: expected frames in data/chunk-*/file-*.parquet, got no such file")
    return files


def column_names(files: Iterable[Path]) -> set[str]:
    """Columns that every one of the files has."""
    return set.intersection(*(set(pq.read_schema(path).names) for path in files))


def read_columns(files: Iterable[Path], *, but: Iterable[str]) -> dict[str, NDArray[Any]]:
    """All columns except `but` of files of one layout, as numpy [F] or [F, D]; text and lists of text as object."""
    skip = set(but)
    tables = [
        pq.ParquetFile(path).read([name for name in pq.read_schema(path).names if name not in skip]) for path in files
    ]
    table = pa.concat_tables(tables, promote_options="default") if len(tables) > 1 else tables[0]
    return {name: _numpy(table.column(name)) for name in table.column_names}


def _numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        value = kind.value_type
        sizes = pc.unique(pc.list_value_length(column)).to_pylist()
        if len(sizes) == 1 and sizes[0] and (pa.types.is_floating(value) or pa.types.is_integer(value)):
            flat = pc.list_flatten(column).to_numpy(zero_copy_only=False)
            return np.asarray(flat.reshape(len(column), sizes[0]))
        return np.array(column.to_pylist() + [None], dtype=object)[:-1]
    return (
        np.asarray(column.to_numpy(zero_copy_only=False))
        if column.null_count == 0
        else np.array(column.to_pylist(), dtype=object)
    )


def read_tasks(root: Path) -> dict[int, str]:
    """task_index -> language instruction."""
    path = root / "meta" / "tasks.parquet"
    if not path.is_file():
        raise DatasetError(f"{root}: expected meta/tasks.parquet with the language instructions, got none")
    table = pq.read_table(path)
    text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if text is None or "task_index" not in table.column_names:
        raise DatasetError(f"{path}: expected columns task and task_index, got {table.column_names}")
    return dict(zip(table.column("task_index").to_pylist(), table.column(text).to_pylist(), strict=True))


def episode_files(root: Path) -> list[Path]:
    files = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise DatasetError(f"{root}: expected meta/episodes/chunk-*/file-*.parquet, got no such file")
    return files


def read_episodes(root: Path) -> dict[str, NDArray[Any]]:
    """The episode table without its statistics: column -> [E]."""
    files = episode_files(root)
    statistics = [name for name in pq.read_schema(files[0]).names if name.startswith("stats/")]
    return read_columns(files, but=statistics)


@dataclass
class ImageTable:
    """Image columns of the data files; frames are addressed by their row in the whole dataset.

    Recorders differ in how many rows stand in one row group, so the last groups read are kept.
    """

    files: list[Path]
    _groups: list[tuple[Path, int, int, int]] = field(default_factory=list)
    _kept: "OrderedDict[tuple[str, int, str], pa.ChunkedArray]" = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        start = 0
        for path in self.files:
            meta = pq.ParquetFile(path).metadata
            for group in range(meta.num_row_groups):
                rows = meta.row_group(group).num_rows
                self._groups.append((path, group, start, start + rows))
                start += rows

    def read(self, column: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Frames of rows start..stop as uint8 [stop - start, H, W, 3]."""
        encoded: list[bytes] = []
        for path, group, first, last in self._groups:
            if first < stop and last > start:
                cells = self._cells(path, group, column)
                encoded += cells[max(start, first) - first : min(stop, last) - first].to_pylist()
        with ThreadPoolExecutor(_DECODERS) as pool:
            frames = list(pool.map(decode, encoded, chunksize=16))
        sizes = {frame.shape for frame in frames}
        if len(sizes) != 1:
            raise DatasetError(f"{column}, rows {start} to {stop}: expected frames of one size, got {sorted(sizes)}")
        return np.stack(frames)

    def _cells(self, path: Path, group: int, column: str) -> pa.ChunkedArray:
        key = (str(path), group, column)
        if key not in self._kept:
            table = pq.ParquetFile(path).read_row_group(group, columns=[column])
            self._kept[key] = pc.struct_field(table.column(column), "bytes")
            while len(self._kept) > 8:
                self._kept.popitem(last=False)
        return self._kept[key]


def decode(data: bytes) -> NDArray[np.uint8]:
    """An encoded image (PNG, JPEG) as uint8 [H, W, 3]."""
    if data is None:
        raise DatasetError("image column: expected image bytes in the parquet file, got none (a path elsewhere?)")
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def derive_spec(root: Path, info: Mapping[str, Any]) -> RobotSpec:
    """A robot spec from the features of a dataset made elsewhere: dimensionless units, and action limits as wide as the
    recorded actions. Put the true one in meta/recap_spec.json to give units and limits."""
    features = info["features"]
    cameras = []
    for name, feature in features.items():
        if name.startswith(IMAGES) and feature["dtype"] in ("image", "video"):
            size = [int(number) for number in feature["shape"]]
            height, width = size[1:] if size[0] == 3 and size[-1] != 3 else size[:2]
            cameras.append(Camera(name.removeprefix(IMAGES), height, width))
    if not cameras:
        raise DatasetError(f"{root}: expected at least one camera {IMAGES}<name>, got features {sorted(features)}")
    stats_path = root / "meta" / "stats.json"
    stats = json.loads(stats_path.read_text()).get("action", {}) if stats_path.is_file() else {}
    names = _names(features["action"])
    low = np.ravel(stats.get("min", [-1.0] * len(names))).astype(float)
    high = np.ravel(stats.get("max", [1.0] * len(names))).astype(float)
    high = np.where(high > low, high, low + 1.0)
    action = tuple(ActionDim(name, "1", float(a), float(b)) for name, a, b in zip(names, low, high, strict=True))
    return RobotSpec(
        str(info.get("robot_type") or "unknown"),
        tuple(cameras),
        tuple(StateDim(name, "1") for name in _names(features["observation.state"])),
        action,
        float(info["fps"]),
        tuple(dict.fromkeys(read_tasks(root).values())),
    )


def _names(feature: Mapping[str, Any]) -> list[str]:
    """Dimension names in LeRobot's two spellings (a list, or a map with one list), or numbers."""
    names = feature.get("names")
    if isinstance(names, Mapping):
        names = next((value for value in names.values() if isinstance(value, list)), list(names))
    size = int(np.prod(feature["shape"]))
    return [str(name) for name in names] if names and len(names) == size else [str(i) for i in range(size)]


def dataset_hash(root: Path, info: Mapping[str, Any]) -> str:
    """The manifest's hash; for a dataset made elsewhere, a hash over meta/info.json and all parquet files of frames and
    episodes. A manifest that does not fit the files any more is refused."""
    if (root / MANIFEST).is_file():
        manifest = read_manifest(root, "dataset")
        for key in ("episodes", "frames"):
            expected, got = manifest.metrics.get(key), info.get(f"total_{key}")
            if expected != got:
                raise DatasetError(
                    f"{root}: {key}: expected {expected} ({MANIFEST}), got {got} (meta/info.json): the "
                    f"dataset was changed after it was made; remove {MANIFEST} to use it as it is"
                )
        return manifest.hash
    digest = hashlib.sha256()
    for path in [root / "meta" / "info.json", *data_files(root), *episode_files(root)]:
        with path.open("rb") as stream:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def features(spec: RobotSpec, *, video: bool = False) -> dict[str, dict[str, Any]]:
    """The LeRobot features of a dataset recorded from a robot with `spec`, RECAP columns included."""
    scalar = {"shape": (1,), "names": None}
    return {
        "observation.state": {"dtype": "float32", "shape": (len(spec.state),), "names": [d.name for d in spec.state]},
        "action": {"dtype": "float32", "shape": (len(spec.action),), "names": [d.name for d in spec.action]},
        **{
            IMAGES + camera.name: {
                "dtype": "video" if video else "image",
                "shape": (camera.height, camera.width, 3),
                "names": ["height", "width", "channels"],
            }
            for camera in spec.cameras
        },
        **{name: {"dtype": "int64", **scalar} for name in ("intervention", "success", "demonstration")},
        "next.reward": {"dtype": "float32", **scalar},
        "next.done": {"dtype": "bool", **scalar},
    }


def whole_rate(spec: RobotSpec) -> int:
    """The control rate as LeRobot's integer fps."""
    if spec.control_hz != int(spec.control_hz):
        raise DatasetError(f"control_hz: expected a whole number (LeRobot's fps is one), got {spec.control_hz}")
    return int(spec.control_hz)
