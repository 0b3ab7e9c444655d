"""One label folder on disk: a parquet file keyed by (episode_index, frame_index) and a manifest, with every check."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_model.manifest import Manifest, publish, require_parent, verify, write_manifest
from training.dataset import Dataset

Columns = dict[str, NDArray[Any]]


class LabelError(ValueError):
    """Labels cannot be made or do not fit the dataset."""


def publish_labels(
    out: Path,
    kind: str,
    episode: NDArray[Any],
    frame: NDArray[Any],
    data: Columns,
    parents: dict[str, str],
    parameters: dict[str, Any],
    metrics: dict[str, Any],
    extra: Callable[[Path], None] | None = None,
) -> Manifest:
    """Publish `data` (name -> [F], beside the keys) as a label folder of `kind` at `out`. extra(folder) adds files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "episode_index": np.asarray(episode, np.int64),
            "frame_index": np.asarray(frame, np.int64),
            **{name: pa.array(values) for name, values in data.items()},
        }
    )
    with publish(out) as folder:
        pq.write_table(table, folder / f"{kind}.parquet")
        if extra is not None:
            extra(folder)
        return write_manifest(folder, kind, parents=parents, parameters=parameters, metrics=metrics)


def read_labels(folder: Path, kind: str, dataset: Dataset) -> tuple[Manifest, Columns]:
    """Manifest and columns in dataset order, after every check: whole, of this kind and dataset, every frame once."""
    import pyarrow.parquet as pq

    folder = Path(folder)
    manifest = verify(folder, kind)
    require_parent(manifest, "dataset", dataset.hash, where=folder)
    table = pq.read_table(folder / f"{kind}.parquet")
    data = {name: np.asarray(table.column(name).to_numpy(zero_copy_only=False)) for name in table.column_names}
    episode, frame = dataset.keys()
    order = np.lexsort((data["frame_index"], data["episode_index"]))
    wanted = np.lexsort((frame, episode))
    if len(order) != len(wanted) or not (
        np.array_equal(data["episode_index"][order], episode[wanted])
        and np.array_equal(data["frame_index"][order], frame[wanted])
    ):
        raise LabelError(
            f"{folder}: expected one row for each of the {len(wanted)} frames of {dataset.root}, got "
            f"{len(order)} rows that do not match them"
        )
    place = np.empty(len(wanted), np.int64)
    place[wanted] = order
    return manifest, {name: values[place] for name, values in data.items()}
