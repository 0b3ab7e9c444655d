"""What can be read of a dataset, however broken: every part that cannot be read is a problem, and the rest goes on."""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from recap_client.spec import RobotSpec
from training import lerobot_files
from training.lerobot_files import IMAGES, SPEC_FILE

BROKEN = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, pa.ArrowException)
"""What hostile files make their readers raise."""
VECTORS = ("observation.state", "action")
Severity = Literal["error", "warning"]
Progress = Callable[[Iterable[Path]], Iterable[Path]]


@dataclass(frozen=True)
class Problem:
    """error: the data is refused, or would teach something false. warning: worth a look. episode: its index."""

    severity: Severity
    check: str
    text: str
    episode: int | None = None
    column: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Loose:
    """What was read. columns: frames but for images; table: the episode table; runs: (episode_index, rows) of every run
    of frames with one episode_index; problems: met on the way."""

    root: Path
    info: dict[str, Any] = field(default_factory=dict)
    spec: RobotSpec | None = None
    files: list[Path] = field(default_factory=list)
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    table: dict[str, NDArray[Any]] = field(default_factory=dict)
    tasks: Mapping[int, str] | None = None
    runs: list[tuple[int, slice]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def fps(self) -> float:
        """Frames a second; NaN when the dataset does not say."""
        try:
            return float(self.info["fps"])
        except (KeyError, TypeError, ValueError):
            return float("nan")

    @property
    def pictures(self) -> dict[str, Mapping[str, Any]]:
        """Camera feature -> its description."""
        features = self.info.get("features")
        found = features.items() if isinstance(features, dict) else ()
        return {n: f for n, f in found if n.startswith(IMAGES) and f.get("dtype") in ("image", "video")}

    @contextmanager
    def attempt(self, what: str, *, column: str | None = None) -> Iterator[None]:
        """Whatever goes wrong inside is a problem."""
        try:
            yield
        except BROKEN as error:
            text = str(error) or type(error).__name__
            text = text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
            self.problems.append(
                Problem("error", "files", text if str(self.root) in text else f"{what}: {text}", column=column)
            )


def read_loosely(root: Path) -> Loose:
    """Read all but images; never raises for what is in the files."""
    loose = Loose(root)
    with loose.attempt(f"{root}/meta/info.json"):
        loose.info = lerobot_files.read_info(root)
    if not loose.info:
        return loose
    with loose.attempt(f"{root}/meta/tasks.parquet"):
        loose.tasks = lerobot_files.read_tasks(root)
    with loose.attempt(f"{root}/meta/episodes"):
        loose.table = lerobot_files.read_episodes(root)
    with loose.attempt(f"{root}/{SPEC_FILE}"):
        path = root / SPEC_FILE
        loose.spec = (
            RobotSpec.from_json(json.loads(path.read_text()))
            if path.is_file()
            else lerobot_files.derive_spec(root, loose.info)
        )
    with loose.attempt(f"{root}/data"):
        found = lerobot_files.data_files(root)
        names: dict[str, None] = {}
        for path in found:
            with loose.attempt(str(path)):
                names |= dict.fromkeys(pq.ParquetFile(path).schema_arrow.names)
                loose.files.append(path)
        _read_columns(loose, [name for name in names if name not in loose.pictures])
    index = loose.columns.get("episode_index")
    if index is not None and len(index) and np.issubdtype(index.dtype, np.integer):
        starts = np.flatnonzero(np.r_[True, np.diff(index) != 0])
        stops = [*starts[1:].tolist(), len(index)]
        loose.runs = [(int(index[a]), slice(a, b)) for a, b in zip(starts.tolist(), stops, strict=True)]
    return loose


def _read_columns(loose: Loose, names: list[str]) -> None:
    """Each column by itself, so that a broken one does not take the others along."""
    everything = {name for path in loose.files for name in pq.read_schema(path).names}
    for name in names:
        with loose.attempt(f"column {name!r}", column=name):
            loose.columns[name] = lerobot_files.read_columns(loose.files, but=everything - {name})[name]


def vector(loose: Loose, column: str) -> NDArray[np.float64] | None:
    """A vector column [F, D], or None when it is no such thing."""
    values = loose.columns.get(column)
    if values is None or values.dtype == object or values.dtype.kind not in "fiub":
        return None
    return values.reshape(len(values), -1).astype(np.float64)


def image_problems(loose: Loose, progress: Progress = iter) -> Iterator[Problem]:
    """Cells of image columns that are empty, truncated, or of another size; one problem an episode and camera."""
    names = [name for name, feature in loose.pictures.items() if feature["dtype"] == "image"]
    bad: dict[tuple[str, int | None], list[str]] = {}
    row = 0
    for path in progress(loose.files) if names else ():
        file = pq.ParquetFile(path)
        for name in names:
            if name not in file.schema_arrow.names:
                yield Problem("error", "images", f"{path}: expected a column of this camera, got none", column=name)
                continue
            size = _size(loose.pictures[name])
            at = row
            for batch in file.iter_batches(256, columns=[name]):
                for cell in batch.column(0).to_pylist():
                    fault = image_fault(cell.get("bytes") if isinstance(cell, dict) else None, size)
                    if fault:
                        bad.setdefault((name, episode_of(loose, at)), []).append(f"{_frame(loose, at)}{fault}")
                    at += 1
        row += file.metadata.num_rows
    for (name, episode), faults in bad.items():
        text = f"{len(faults)} frames without a usable image, the first: {faults[0]}"
        yield Problem("error", "images", text, episode, name)


def image_fault(data: bytes | None, size: tuple[int, int] | None) -> str | None:
    """What is wrong with an encoded image; None when nothing is. size: (height, width) expected. Pixels are not
    decoded: PNG carries checksums, and a JPEG that was cut off has no end marker."""
    if data is None:
        return "expected image bytes, got none"
    try:
        with Image.open(io.BytesIO(data)) as image:
            height, width, kind = image.height, image.width, image.format
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        return f"expected an image, got {len(data)} bytes that cannot be read ({error})"
    if kind == "JPEG" and b"\xff\xd9" not in data[-64:]:
        return f"expected a whole JPEG, got {len(data)} bytes without its end"
    if size is not None and (height, width) != size:
        return f"expected {size[0]}x{size[1]}, got {height}x{width}"
    return None


def _size(feature: Mapping[str, Any]) -> tuple[int, int] | None:
    shape = [int(number) for number in feature.get("shape", ())]
    if len(shape) != 3:
        return None
    height, width = shape[1:] if shape[0] == 3 and shape[-1] != 3 else shape[:2]
    return height, width


def episode_of(loose: Loose, row: int) -> int | None:
    return next((index for index, rows in loose.runs if rows.start <= row < rows.stop), None)


def _frame(loose: Loose, row: int) -> str:
    start = next((rows.start for _, rows in loose.runs if rows.start <= row < rows.stop), None)
    return f"row {row}: " if start is None else f"frame {row - start}: "


def video_problems(loose: Loose, progress: Progress = iter) -> Iterator[Problem]:
    """Video files that are missing, unreadable, or hold fewer frames than the episodes need."""
    users: dict[Path, list[tuple[int, int, int, str]]] = {}
    for name in [name for name, feature in loose.pictures.items() if feature["dtype"] == "video"]:
        try:
            chunk, file = (loose.table[f"videos/{name}/{part}_index"] for part in ("chunk", "file"))
            for number, (index, rows) in enumerate(loose.runs):
                path = loose.root / loose.info["video_path"].format(
                    video_key=name, chunk_index=int(chunk[number]), file_index=int(file[number])
                )
                users.setdefault(path, []).append((number, index, rows.stop - rows.start, name))
        except BROKEN as error:
            text = f"meta/episodes: expected where the videos of every episode lie, got none ({error!r})"
            yield Problem("error", "videos", text, column=name)
    for path in progress(sorted(users)):
        name, who = users[path][0][3], [index for _, index, _, _ in users[path]]
        if not path.is_file():
            yield Problem("error", "videos", f"{path}: expected the video of episodes {shorten(who)}, got no such file",
                          column=name)  # fmt: skip
            continue
        try:
            times = frame_times(path)
        except (OSError, ValueError) as error:
            yield Problem("error", "videos", f"{path}: expected the video of episodes {shorten(who)}, got a file that "
                          f"cannot be read ({error})", column=name)  # fmt: skip
            continue
        for number, index, length, _ in users[path]:
            start = float(loose.table[f"videos/{name}/from_timestamp"][number])
            step = 1.0 / loose.fps
            got = int(((times > start - step / 2) & (times < start + (length - 0.5) * step)).sum())
            if got < length:
                text = f"{path}: expected {length} frames from {start:g} s at {loose.fps:g} fps, got {got}"
                yield Problem("error", "videos", text, index, name)


def frame_times(path: Path) -> NDArray[np.float64]:
    """Times in s of the whole frames of a video file, in order; nothing is decoded. Raises OSError or ValueError."""
    import av

    times = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("no video in it")
            for packet in container.demux(container.streams.video[0]):
                if packet.pts is not None and packet.size and not packet.is_corrupt and packet.time_base is not None:
                    times.append(float(packet.pts * packet.time_base))
    except av.error.FFmpegError as error:
        raise ValueError(str(error)) from error
    return np.sort(np.array(times))


def shorten(numbers: Iterable[int], most: int = 8) -> str:
    """Numbers as text, the many as the first few."""
    all_ = list(numbers)
    text = ", ".join(str(number) for number in all_[:most])
    return text + (f" ... ({len(all_)} in all)" if len(all_) > most else "")
