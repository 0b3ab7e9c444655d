"""Datasets of several robots as one table to train on (the pre-training of pi*0.6, appendix F; seed of SmolVLA).

Frames arrive at the model normalised with their own dataset's statistics and padded: vectors with zeros up to the
model's width, cameras with black frames that nothing attends to. What is padding in an action is not in the loss.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_model import conditioning
from recap_model.normalize import NormStats, normalize
from recap_model.policy.config import PolicyConfig
from recap_model.spec import PolicySpec
from training.loader import FrameTable
from training.mixture import Mixture, MixtureError
from training.table import TableSource, load_table


def load_members(mixture: Mixture, mode: str) -> tuple[TableSource, ...]:
    """Every member's frames in memory, with the indicators that `mode` ("recap", "imitation", "filtered") trains on."""
    labelled = [member.name for member in mixture.members if member.labels is not None]
    if mode == "imitation" and labelled:
        raise MixtureError(
            f"{mixture.path}: mode 'imitation' takes no labels (every frame is positive), got labels for {labelled}; "
            "use --mode recap"
        )
    if mode != "imitation" and not (labelled or any(member.expert for member in mixture.members)):
        raise MixtureError(
            f"{mixture.path}: mode {mode!r} needs `labels` (made by `recap label --n episode`) or `expert = true` for "
            "at least one dataset, got neither; or use --mode imitation"
        )
    sources = []
    for member in mixture.members:
        source = load_table(member.dataset, labels=member.labels)
        if mode == "imitation" or member.expert:
            positive = np.full(len(source.table), conditioning.POSITIVE, np.int8)
            source = replace(source, table=replace(source.table, indicator=positive))
        sources.append(source)
    _require_one_size(mixture, sources)
    return tuple(sources)


def _require_one_size(mixture: Mixture, sources: Sequence[TableSource]) -> None:
    found = [source.table.images.shape[2:4] for source in sources]
    if len(set(found)) != 1:
        sizes = ", ".join(f"{m.name} {h}x{w}" for m, (h, w) in zip(mixture.members, found, strict=True))
        raise MixtureError(
            f"{mixture.path}: expected camera frames of one size (height x width) in all datasets, got {sizes}; resize "
            "the frames before ingesting"
        )


def statistics(source: TableSource) -> dict[str, NormStats]:
    """Statistics of state and action of a dataset, in physical units."""
    return {"state": NormStats.of(source.table.state), "action": NormStats.of(source.table.action)}


def identity_stats(state: int, action: int) -> dict[str, NormStats]:
    """Statistics under which every mode of normalisation changes nothing: what arrives is normalised already."""

    def of(size: int) -> NormStats:
        zero, one = np.zeros(size), np.ones(size)
        return NormStats(zero, one, -one, one, -one, one)

    return {"state": of(state), "action": of(action)}


def stack(sources: Sequence[TableSource], specs: Sequence[PolicySpec], config: PolicyConfig) -> FrameTable:
    """All members' rows in their order, normalised and padded to `config`, whose state_dim and action_dim are widths.

    specs: each member's robot as the policy knows it; their `text` is what stands in the prompts.
    """
    tables = [source.table for source in sources]
    sizes = [len(table) for table in tables]
    texts = [[spec.text(task) for task in table.tasks] for spec, table in zip(specs, tables, strict=True)]
    state, action = zip(*(_normalized(source, config) for source in sources), strict=True)
    return FrameTable(
        images=Frames([table.images for table in tables], config.cameras),  # type: ignore[arg-type]
        state=np.concatenate(state),
        action=np.concatenate(action),
        end=_joined([table.end for table in tables], sizes),
        episode=_joined([table.episode for table in tables], [int(table.episode.max()) + 1 for table in tables]),
        task=_joined([table.task for table in tables], [len(part) for part in texts]),
        tasks=tuple(text for part in texts for text in part),
        indicator=np.concatenate([table.indicator for table in tables]),
        target=np.concatenate([table.target for table in tables]),
        action_mask=_first([table.action.shape[1] for table in tables], sizes, config.action_dim),
        action_is_pad=_pads(tables, config.chunk),
        camera_mask=_first([table.images.shape[1] for table in tables], sizes, config.cameras),
    )


def _normalized(source: TableSource, config: PolicyConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(state, action) of a dataset with its own statistics, padded with zeros."""
    stats, table = statistics(source), source.table
    state = normalize(table.state, stats["state"], config.state_norm)
    action = normalize(table.action, stats["action"], config.action_norm)
    return _padded(state, config.state_dim), _padded(action, config.action_dim)


def _joined(parts: Sequence[NDArray[np.int64]], counts: Sequence[int]) -> NDArray[np.int64]:
    """Indices into `counts[i]` things of member i -> indices into all members' things."""
    starts = np.cumsum([0, *counts])
    return np.concatenate([part + start for part, start in zip(parts, starts[:-1], strict=True)])


class Frames:
    """Images of several tables, read as one array uint8 [N, cameras, H, W, 3] that never is in memory as a whole.

    A table's cameras come first, in its own order; those that it lacks are black.
    """

    def __init__(self, parts: Sequence[NDArray[np.uint8]], cameras: int) -> None:
        self._parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.shape = (int(self._starts[-1]), cameras, *parts[0].shape[2:])

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images of `rows` [B], in their order."""
        out = np.zeros((len(rows), *self.shape[1:]), np.uint8)
        member = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(member):
            own = member == number
            found = self._parts[number][rows[own] - self._starts[number]]
            out[own, : found.shape[1]] = found
        return out


class MixtureSampler:
    """Batches of `batch_size` rows in which member i has the share `shares[i]` on average, and is never a whole frame
    further from it. Drawn by a generator of (seed, step) alone, so a resumed run sees the same rows.

    rows: the rows of each member. A batch has a frame twice only where a member has fewer frames than places in it.
    """

    def __init__(
        self, rows: Sequence[NDArray[np.int64]], shares: NDArray[np.float64], batch_size: int, seed: int
    ) -> None:
        self._rows, self._size, self._seed = tuple(rows), batch_size, seed
        self._edges = np.concatenate([np.cumsum(shares)[:-1], [1.0]]) * batch_size

    def __call__(self, step: int) -> NDArray[np.int64]:
        """Rows of batch `step` [batch_size]."""
        rng = np.random.default_rng([self._seed, step, 13])
        # one offset for all members: what one of them gains by rounding, its neighbour loses
        counts = np.diff(np.floor(self._edges + rng.random()).astype(np.int64), prepend=0)
        drawn = [
            rng.choice(rows, count, replace=bool(count > len(rows)))
            for rows, count in zip(self._rows, counts, strict=True)
        ]
        return rng.permutation(np.concatenate(drawn))


def member_rows(mixture: Mixture, sources: Sequence[TableSource], *, positive: bool) -> list[NDArray[np.int64]]:
    """The rows of each member in the stacked table; positive: only those with a positive indicator."""
    rows: list[NDArray[np.int64]] = []
    start = 0
    for member, source in zip(mixture.members, sources, strict=True):
        indicator = source.table.indicator
        found = np.flatnonzero(indicator == conditioning.POSITIVE if positive else indicator >= conditioning.NONE)
        if not len(found):
            raise MixtureError(f"{mixture.path}: {member.name}: mode 'filtered' expected positive frames, got none")
        rows.append(found + start)
        start += len(source.table)
    return rows


def describe(mixture: Mixture, sources: Sequence[TableSource]) -> dict[str, Any]:
    """The content of `FILE`: plain JSON, without paths."""
    return {
        "serves": mixture.members[mixture.served].name,
        "datasets": [
            {
                "name": member.name,
                "share": float(share),
                "expert": member.expert,
                "dataset": source.hash,
                "labels": source.labels_hash or None,
                "robot": source.robot.to_json(),
            }
            for member, source, share in zip(mixture.members, sources, mixture.shares, strict=True)
        ],
    }


def _first(counts: Sequence[int], sizes: Sequence[int], width: int) -> NDArray[np.bool_]:
    """bool [N, width]: in the rows of member i the first counts[i] are true."""
    return np.arange(width) < np.repeat(counts, sizes)[:, None]


def _padded(x: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    return np.pad(x, ((0, 0), (0, width - x.shape[1])))


def _pads(tables: Sequence[FrameTable], chunk: int) -> NDArray[np.bool_] | None:
    """Every member's `action_is_pad` in the one form that holds them all, see `FrameTable`."""
    pads = [table.action_is_pad for table in tables]
    if all(pad is None for pad in pads):
        return None
    flat = [np.zeros(len(t), bool) if pad is None else pad for t, pad in zip(tables, pads, strict=True)]
    if all(pad.ndim == 1 for pad in flat):
        return np.concatenate(flat)
    out = []
    for table, pad in zip(tables, flat, strict=True):
        steps = np.minimum(np.arange(len(pad))[:, None] + np.arange(chunk), table.end[:, None] - 1)
        own = pad[steps] if pad.ndim == 1 else pad[:, :chunk]
        # a column that is too short says nothing of the steps behind it, and what is unknown is not learned
        out.append(np.pad(own, ((0, 0), (0, chunk - own.shape[1])), constant_values=True))
    return np.concatenate(out)
