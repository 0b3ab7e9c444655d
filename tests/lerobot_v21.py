"""Datasets in LeRobot's old layout, for tests of the conversion."""

import json

import pyarrow as pa
import pyarrow.parquet as pq


def write_v21(dataset, root):
    """The old layout, written by hand: one parquet file per episode, JSON lines for episodes and tasks."""
    table = pa.concat_tables([pq.read_table(p) for p in sorted((dataset.root / "data").glob("*/*.parquet"))])
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    info = json.loads((dataset.root / "meta" / "info.json").read_text())
    lines = {"episodes": [], "tasks": [], "episodes_stats": []}
    tasks = sorted({e.task for e in dataset.episodes})
    order = pq.read_table(dataset.root / "meta" / "tasks.parquet").to_pylist()
    lines["tasks"] = [{"task_index": row["task_index"], "task": row["task"]} for row in order]
    stats = json.loads((dataset.root / "meta" / "stats.json").read_text())
    kept = {name: {k: v for k, v in stat.items() if k in ("min", "max", "mean", "std", "count")}
            for name, stat in stats.items()}  # fmt: skip
    start = 0
    for episode in dataset.episodes:
        rows = table.slice(start, len(episode))
        pq.write_table(rows, root / "data" / "chunk-000" / f"episode_{episode.index:06d}.parquet")
        start += len(episode)
        lines["episodes"].append({"episode_index": episode.index, "tasks": [episode.task], "length": len(episode)})
        lines["episodes_stats"].append({"episode_index": episode.index, "stats": kept})
    for name, rows in lines.items():
        (root / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info |= {"codebase_version": "v2.1", "total_chunks": 1, "total_videos": 0, "total_tasks": len(tasks),
             "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"}  # fmt: skip
    info.pop("data_files_size_in_mb", None)
    info.pop("video_files_size_in_mb", None)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    return root
