"""Several LeRobot v3.0 datasets of one robot -> one dataset, with every column, and a record of what came from where.

Frames are copied, not decoded: lossless images stay bit-equal, and video files are copied as they are unless another
form is asked for.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recap_model.manifest import Manifest, publish, write_manifest
from training import lerobot_files
from training.columns import OUTCOME_COLUMNS
from training.data_merge_plan import MergeError, MergePlan, Source
from training.data_merge_video import Part
from training.data_merge_writer import MergedWriter
from training.dataset import Dataset, Episode
from training.ingest import PROVENANCE as RECORDINGS
from training.lerobot_files import SPEC_FILE

PROVENANCE = Path("meta") / "recap_sources.json"


def merge(
    plan: MergePlan,
    out: Path,
    *,
    progress: Callable[[Iterable[tuple[Source, int]]], Iterable[tuple[Source, int]]] = iter,
) -> Manifest:
    """Write the merged dataset at `out` (atomically; it must not exist), its provenance and its manifest."""
    if out.exists():
        raise MergeError(f"{out}: expected a folder that does not exist yet for the merged dataset, got one")
    specified = any(source.specified for source in plan.sources)
    with publish(out) as folder:
        tables: dict[str, Iterator[pa.Table]] = {}
        with MergedWriter(folder, plan.columns, plan.cameras, [s.info for s in plan.sources], plan.spec) as writer:
            for source, number in progress(plan.episodes()):
                if source.name not in tables:
                    tables[source.name] = _episode_tables(source, plan.cameras)
                writer.add(_part(plan, source, number, next(tables[source.name])))
        if specified:  # without one, units and limits stay what nobody has stated
            _write_json(folder / SPEC_FILE, plan.spec.to_json())
        _write_json(folder / PROVENANCE, _provenance(plan))
        recordings = _recordings(plan.sources)
        if recordings is not None:
            _write_json(folder / RECORDINGS, recordings)
        return write_manifest(
            folder,
            "dataset",
            parents={f"source {number}": source.data.hash for number, source in enumerate(plan.sources)},
            parameters={"cameras": dict(plan.cameras), "filled": {k: dict(v) for k, v in plan.fills.items() if v}},
            metrics=_metrics([episode for source in plan.sources for episode in source.data.episodes]),
        )


def split(merged: Dataset) -> dict[str, list[Episode]]:
    """The episodes of a merged dataset by the source they came from, in the source's order."""
    path = merged.root / PROVENANCE
    if not path.is_file():
        raise MergeError(f"{merged.root}: expected a dataset of `recap data merge` (with {PROVENANCE}), got none")
    return {row["source"]: list(merged.episodes[slice(*row["episodes"])]) for row in json.loads(path.read_text())}


def _episode_tables(source: Source, cameras: Mapping[str, str]) -> Iterator[pa.Table]:
    """The rows of every episode, without images that are to be encoded anew."""
    skip = {name for name, kind in source.pictures.items() if kind != "image" or cameras[name] != "image"}
    lengths = iter([len(episode) for episode in source.data.episodes])
    rest, need = None, next(lengths, None)
    for path in lerobot_files.data_files(source.data.root):
        table = pq.ParquetFile(path).read([name for name in pq.read_schema(path).names if name not in skip])
        rest = pa.concat_tables([rest, table], promote_options="default") if rest is not None else table
        while need is not None and len(rest) >= need:
            yield rest.slice(0, need)
            rest, need = rest.slice(need), next(lengths, None)


def _part(plan: MergePlan, source: Source, number: int, rows: pa.Table) -> Part:
    episode = source.data.episodes[number]
    filled = {name: episode.success if name in OUTCOME_COLUMNS else None for name in plan.episode_columns}
    whole = {name: _plain(source.table[name][number]) for name in filled if name in source.table}
    return Part(source.data.root, source.info, episode, number, rows, source.table, filled | whole)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _provenance(plan: MergePlan) -> list[dict[str, Any]]:
    rows, start, frame = [], 0, 0
    for source in plan.sources:
        episodes, frames = len(source.data.episodes), source.data.frames
        row: dict[str, Any] = {
            "source": source.name,
            "hash": source.data.hash,
            "episodes": [start, start + episodes],
            "frames": [frame, frame + frames],
            "source_episodes": [episode.index for episode in source.data.episodes],
            "filled": dict(plan.fills[source.name]),
        }
        earlier = source.data.root / PROVENANCE
        if earlier.is_file():
            row["sources"] = json.loads(earlier.read_text())
        rows.append(row)
        start, frame = start + episodes, frame + frames
    return rows


def _recordings(sources: Sequence[Source]) -> list[Any] | None:
    """`recap ingest`'s record of every episode, null where a source has none; None when no source has one."""
    rows: list[Any] = []
    for source in sources:
        path = source.data.root / RECORDINGS
        rows += json.loads(path.read_text()) if path.is_file() else [None] * len(source.data.episodes)
    return rows if any(rows) else None


def _metrics(episodes: Sequence[Episode]) -> dict[str, Any]:
    count, wins = Counter(e.task for e in episodes), Counter(e.task for e in episodes if e.success)
    return {
        "episodes": len(episodes),
        "frames": int(np.sum([len(episode) for episode in episodes])),
        "successes": sum(wins.values()),
        "tasks": {task: {"episodes": number, "successes": wins[task]} for task, number in sorted(count.items())},
    }


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")
