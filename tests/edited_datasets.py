"""Small datasets by the project's own writer, and the ways in which others' come out differently or broken."""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim
from training.dataset_writer import DatasetWriter, EpisodeData
from training.lerobot_files import IMAGES

SPEC = RobotSpec(
    "toy",
    (Camera("front", 32, 32), Camera("top", 32, 32)),
    (StateDim("x", "m"), StateDim("grip", "1")),
    (ActionDim("dx", "1", -1.0, 1.0), ActionDim("grip", "1", -1.0, 1.0)),
    20.0,
    ("open it", "close it"),
)


def write_dataset(
    root: Path,
    lengths: Sequence[int] = (4, 5, 6, 7),
    *,
    successes: Sequence[bool] | None = None,
    tasks: Sequence[str] = ("open it", "close it"),
    spec: RobotSpec = SPEC,
    seed: int = 0,
) -> Path:
    """Episodes of random numbers; episode i has task i modulo the tasks. No manifest, as a dataset made elsewhere."""
    random = np.random.default_rng(seed)
    root.mkdir(parents=True)
    with DatasetWriter(root, spec) as writer:
        for number, steps in enumerate(lengths):
            won = number % 3 != 2 if successes is None else successes[number]
            writer.add(
                EpisodeData(
                    task=tasks[number % len(tasks)],
                    state=random.normal(size=(steps, len(spec.state))).astype(np.float32),
                    action=random.uniform(-1, 1, (steps, len(spec.action))).astype(np.float32),
                    images={
                        c.name: random.integers(0, 256, (steps, c.height, c.width, 3), np.uint8) for c in spec.cameras
                    },
                    intervention=random.random(steps) < 0.2,
                    demonstration=number % 4 == 0,
                    success=won,
                    reward=random.normal(size=steps),
                )
            )
    return root


def edit(root: Path, change: Callable[[pa.Table], pa.Table], where: str = "data") -> None:
    """Rewrite the parquet files of frames, or of the episode table."""
    for path in (root / where).glob("chunk-*/file-*.parquet"):
        pq.write_table(change(pq.read_table(path)), path)


def set_column(root: Path, name: str, values: Sequence[Any], where: str = "data") -> None:
    """Give a column other values (or add it), keeping its type."""

    def change(table: pa.Table) -> pa.Table:
        if name not in table.column_names:
            return table.append_column(name, pa.array(values))
        place = table.column_names.index(name)
        field = table.schema.field(place)
        return table.set_column(place, field, pa.array(values, type=field.type))

    edit(root, change, where)


def column(root: Path, name: str, where: str = "data") -> list[Any]:
    """A column of the only file."""
    (path,) = (root / where).glob("chunk-*/file-*.parquet")
    return pq.read_table(path).column(name).to_pylist()


def drop(root: Path, *names: str, where: str = "data") -> None:
    edit(root, lambda table: table.drop_columns(list(names)), where)


def to_video(root: Path) -> Path:
    """Store the cameras as one video file each, smooth pictures instead of noise, as another recorder would."""
    import av

    info = json.loads((root / "meta" / "info.json").read_text())
    lengths = column(root, "length", "meta/episodes")
    starts = np.r_[0, np.cumsum(lengths)[:-1]] / info["fps"]
    for name in [name for name in info["features"] if name.startswith(IMAGES)]:
        path = root / "videos" / name / "chunk-000" / "file-000.mp4"
        path.parent.mkdir(parents=True)
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("mpeg4", rate=Fraction(info["fps"]))
            stream.height, stream.width = info["features"][name]["shape"][:2]
            stream.pix_fmt = "yuv420p"
            for number in range(sum(lengths)):
                picture = np.full((stream.height, stream.width, 3), 10 * number % 250, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        info["features"][name]["dtype"] = "video"
        drop(root, name)
        for part in ("chunk_index", "file_index"):
            set_column(root, f"videos/{name}/{part}", [0] * len(lengths), "meta/episodes")
        set_column(root, f"videos/{name}/from_timestamp", starts.tolist(), "meta/episodes")
        ends = starts + np.array(lengths) / info["fps"]
        set_column(root, f"videos/{name}/to_timestamp", ends.tolist(), "meta/episodes")
    info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    (root / "meta" / "info.json").write_text(json.dumps(info))
    return root
