"""Can these datasets become one? Everything is compared before anything is written, and all differences are told at
once: cameras, dimensions, units, limits, rate, and columns that only some have."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recap_client.spec import RobotSpec
from training import lerobot_files
from training.data_fill import fill_words
from training.dataset import Dataset, open_dataset
from training.lerobot_files import IMAGES, SPEC_FILE

COUNTED = ("episode_index", "index", "task_index")
"""Frame columns that are counted anew."""
Cameras = Literal["keep", "image", "video"]
_EPISODE_TABLE = "meta/episodes "


class MergeError(ValueError):
    """Datasets cannot become one; the message lists every difference."""


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset to merge. schema: of its frames; table: its episode table; specified: it has a meta/recap_spec.json."""

    data: Dataset
    info: Mapping[str, Any]
    schema: pa.Schema
    table: Mapping[str, NDArray[Any]]
    specified: bool

    @property
    def name(self) -> str:
        return str(self.data.root)

    @property
    def pictures(self) -> dict[str, str]:
        """Camera feature -> image or video."""
        kinds = {name: str(feature["dtype"]) for name, feature in self.info["features"].items()}
        return {name: kind for name, kind in kinds.items() if kind in ("image", "video") and name.startswith(IMAGES)}

    def columns(self) -> dict[str, pa.DataType]:
        """Columns that are copied: of frames under their names, of the episode table under "meta/episodes NAME"."""
        frames = {f.name: f.type for f in self.schema if f.name not in (*COUNTED, *self.pictures)}
        own = [name for name in self.table if "/" not in name and name not in _COUNTED_EPISODES]
        return frames | {_EPISODE_TABLE + name: pa.null() for name in own}

    def signature(self, column: str) -> str:
        """A column's type as it is compared: list types alike, text types alike."""
        return _words(self.columns()[column], ",".join(str(number) for number in self.shape(column)))

    def shape(self, column: str) -> tuple[int, ...]:
        """A column's shape as meta/info.json states it; empty where it does not."""
        return tuple(self.info["features"].get(column, {}).get("shape", ()))


_COUNTED_EPISODES = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")


@dataclass(frozen=True, eq=False)
class MergePlan:
    """What will be written. columns: frame column -> arrow type; cameras: feature -> image or video; fills: source ->
    column it lacks -> what is written there."""

    sources: tuple[Source, ...]
    spec: RobotSpec
    columns: Mapping[str, pa.DataType]
    episode_columns: tuple[str, ...]
    cameras: Mapping[str, str]
    fills: Mapping[str, Mapping[str, str]]

    def episodes(self) -> list[tuple[Source, int]]:
        """(source, position of the episode in it) in the order of the merged dataset."""
        return [(source, number) for source in self.sources for number in range(len(source.data.episodes))]


def plan_merge(folders: Sequence[Path], *, cameras: Cameras = "keep", fill_missing: bool = False) -> MergePlan:
    """Open and compare the datasets. Raises MergeError listing all differences; a column that only some have is one
    unless `fill_missing`. cameras: `keep` copies images and videos as they are, the others decode and encode again."""
    if len(folders) < 2:
        raise MergeError(f"expected at least two datasets to merge, got {len(folders)}")
    sources = tuple(_source(Path(folder)) for folder in folders)
    first = sources[0]
    differences = list(_same_data(sources))
    for other in sources[1:]:
        differences += [f"{other.name}: {text} (as in {first.name})" for text in _compare(first, other, cameras)]
    columns, missing = _columns(sources)
    if missing and not fill_missing:
        differences += [
            f"column {column!r}: expected in every dataset, got none in {', '.join(lacking)} (--fill-missing fills in: "
            f"{fill_words(column, columns[column])})"
            for column, lacking in missing.items()
        ]
    if differences:
        raise MergeError(f"the datasets differ in {len(differences)} points:\n  " + "\n  ".join(differences))
    kinds = {name: first.pictures[name] if cameras == "keep" else cameras for name in first.pictures}
    fills = {
        source.name: {c: fill_words(c, columns[c]) for c, lacking in missing.items() if source.name in lacking}
        for source in sources
    }
    frames = {name: kind for name, kind in columns.items() if not name.startswith(_EPISODE_TABLE)}
    whole = tuple(name.removeprefix(_EPISODE_TABLE) for name in columns if name.startswith(_EPISODE_TABLE))
    return MergePlan(sources, _merged_spec(sources), frames, whole, kinds, fills)


def _source(root: Path) -> Source:
    data = open_dataset(root)
    info = lerobot_files.read_info(root)
    schemas = [pq.read_schema(path).remove_metadata() for path in lerobot_files.data_files(root)]
    schema = pa.unify_schemas(schemas, promote_options="default")
    return Source(data, info, schema, lerobot_files.read_episodes(root), (root / SPEC_FILE).is_file())


def _same_data(sources: Sequence[Source]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for source in sources:
        if source.data.hash in seen:
            yield f"{source.name}: the same data as {seen[source.data.hash]}: its episodes would count twice"
        seen.setdefault(source.data.hash, source.name)


def _compare(first: Source, other: Source, cameras: Cameras) -> Iterator[str]:
    """Differences of `other` against `first`, each as "what: expected, got"."""
    one, two = first.data.spec, other.data.spec
    if float(first.info["fps"]) != float(other.info["fps"]) or one.control_hz != two.control_hz:
        yield f"fps: expected {first.info['fps']}, got {other.info['fps']}"
    sizes = [{c.name: f"{c.height}x{c.width}" for c in spec.cameras} for spec in (one, two)]
    yield from _differences("camera", *sizes)
    if list(sizes[0]) != list(sizes[1]) and sorted(sizes[0]) == sorted(sizes[1]):
        yield f"cameras: expected in the order {list(sizes[0])}, got {list(sizes[1])}"
    yield from _compare_dimensions(first, other)
    if cameras == "keep":
        for name in sorted(first.pictures.keys() & other.pictures.keys()):
            if first.pictures[name] != other.pictures[name]:
                yield (
                    f"{name}: expected {first.pictures[name]}, got {other.pictures[name]}; --cameras image (lossless "
                    "from here on) or --cameras video (small) stores all alike"
                )
    for name in sorted(first.columns().keys() & other.columns().keys()):
        mine, theirs = first.signature(name), other.signature(name)
        if mine != theirs and "null" not in (mine, theirs) and name not in ("observation.state", "action"):
            yield f"column {name!r}: expected {mine}, got {theirs}"


def _compare_dimensions(first: Source, other: Source) -> Iterator[str]:
    one, two = first.data.spec, other.data.spec
    hint = "" if first.specified == other.specified else f"; only one of the two has {SPEC_FILE}: copy it over"
    for field, column in (("state", "observation.state"), ("action", "action")):
        names = [[dim.name for dim in getattr(spec, field)] for spec in (one, two)]
        if names[0] != names[1]:
            yield f"{field}: expected the dimensions {names[0]}, got {names[1]}"
            continue
        for a, b in zip(getattr(one, field), getattr(two, field), strict=True):
            if a.unit != b.unit:
                yield f"{field}[{a.name}]: expected the unit {a.unit}, got {b.unit}{hint}"
        if first.signature(column) != other.signature(column):
            yield f"column {column!r}: expected {first.signature(column)}, got {other.signature(column)}"
    if first.specified and other.specified:  # else the limits are but the recorded extremes
        for a, b in zip(one.action, two.action, strict=False):
            if a.name == b.name and (a.low, a.high) != (b.low, b.high):
                yield f"action[{a.name}]: expected the limits {a.low:g} to {a.high:g}, got {b.low:g} to {b.high:g}"


def _differences(what: str, expected: Mapping[str, str], got: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys([*expected, *got]):
        one, two = expected.get(name, "none"), got.get(name, "none")
        if one != two:
            yield f"{what} {name!r}: expected {one}, got {two}"


def _words(kind: pa.DataType, size: str) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"{_words(kind.value_type, '')}[{kind.list_size}]"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"{_words(kind.value_type, '')}[{size}]"
    return str(kind).removeprefix("large_")


def _sized(kind: pa.DataType, shape: tuple[int, ...]) -> pa.DataType:
    """A list type with the stated length, so that what is filled in has it."""
    return pa.list_(kind.value_type, shape[0]) if pa.types.is_list(kind) and len(shape) == 1 else kind


def _columns(sources: Sequence[Source]) -> tuple[dict[str, pa.DataType], dict[str, list[str]]]:
    """(column -> type over all sources, column -> names of the sources without it)."""
    having = {source.name: source.columns() for source in sources}
    columns: dict[str, pa.DataType] = {}
    for own in having.values():
        for name, kind in own.items():
            if name not in columns or pa.types.is_null(columns[name]):
                columns[name] = kind
    missing = {c: [name for name, own in having.items() if c not in own] for c in columns}
    missing = {c: lacking for c, lacking in missing.items() if lacking}
    for name in missing:
        columns[name] = _sized(columns[name], next((s.shape(name) for s in sources if s.shape(name)), ()))
    if "intervention" in missing and "demonstration" not in columns:
        # without either column episodes are read as demonstrations; once one is filled in, that has to be said
        columns["demonstration"] = pa.int64()
        missing["demonstration"] = list(having)
    return columns, missing


def _merged_spec(sources: Sequence[Source]) -> RobotSpec:
    """The common spec with the tasks that occur; limits nobody stated are the extremes of all."""
    specs = [source.data.spec for source in sources]
    stated = next((s.data.spec for s in sources if s.specified), None)
    action = tuple(
        replace(dims[0], low=min(d.low for d in dims), high=max(d.high for d in dims))
        for dims in zip(*(spec.action for spec in specs), strict=True)
    )
    tasks = tuple(sorted({episode.task for source in sources for episode in source.data.episodes}))
    return replace(stated or replace(specs[0], action=action), tasks=tasks)
