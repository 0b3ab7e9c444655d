"""What a policy's training starts with: frames, the rows of every batch, the policy, and what they were made from."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recap_model import conditioning
from recap_model.checkpoint import CheckpointFiles
from recap_model.manifest import read_manifest
from recap_model.policy.model import Policy
from training import mixture_table
from training.loader import FrameTable, Sampler
from training.mixture import FILE, Mixture, MixtureError
from training.mixture_start import start_mixture
from training.sampling import BalancedSampler
from training.settings import PolicySettings
from training.start import start
from training.streaming import MEMORY, Frames
from training.table import TableSource, load_table, prompted

Mode = Literal["imitation", "recap", "filtered"]
Rows = Callable[[int], NDArray[np.int64]]
ROBOT_SIZES = ("cameras", "empty_cameras", "state_dim", "action_dim")


@dataclass(frozen=True)
class Prepared:
    """table: what the loader reads, its tasks as they stand in the prompts. rows: optimiser step -> rows of its batch,
    drawn from `frames` frames. files: of the checkpoint to publish; config has the sizes of the robot that it serves,
    which in a mixture are not those that `policy` trains with. parameters, metrics: for the manifest. extra: further
    files of the checkpoint, name -> JSON."""

    table: FrameTable
    policy: Policy
    files: CheckpointFiles
    rows: Rows
    frames: int
    parents: dict[str, str]
    parameters: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def served(self) -> dict[str, Any]:
        """What of the published config.json is the served robot's."""
        return {key: self.files.config.get(key, self.policy.config.to_json()[key]) for key in ROBOT_SIZES}


def prepare(
    settings: PolicySettings,
    data: Path | Mixture,
    labels: Path | None,
    init: Path | None,
    mode: Mode,
    frames: Frames = MEMORY,
) -> Prepared:
    """Everything but the optimisation, for one dataset (and its label folder) or a mixture of them."""
    if isinstance(data, Mixture) and frames != MEMORY:
        raise MixtureError(f"--frames disk: expected one dataset, got the mixture {data.path}, which is kept in memory")
    run = (
        _mixture(settings, data, labels, init, mode)
        if isinstance(data, Mixture)
        else _single(settings, data, labels, init, mode, frames)
    )
    if settings.max_delay is not None:
        run.policy.config = replace(run.policy.config, max_delay=settings.max_delay)
    return replace(run, parents=run.parents | ({"init": read_manifest(init).hash} if init else {}))


def _single(
    settings: PolicySettings, dataset: Path, labels: Path | None, init: Path | None, mode: Mode, frames: Frames
) -> Prepared:
    if (mode != "imitation") != (labels is not None):
        raise ValueError(
            f"--labels: mode {mode!r} "
            + (
                "needs a label folder (made by `recap label`), got none"
                if mode != "imitation"
                else f"takes no labels, got {labels}; use --mode recap"
            )
        )
    source = load_table(dataset, labels=labels, frames=frames)
    source = replace(source, table=with_indicator(source.table, mode))
    policy, files = start(settings, source, init)
    rows, count = _rows(settings, source, mode)
    parents = {"dataset": source.hash} | ({"labels": source.labels_hash} if labels else {})
    return Prepared(prompted(source.table, files.spec), policy, files, rows, count, parents)


def with_indicator(table: FrameTable, mode: Mode) -> FrameTable:
    """The table with the indicators that `mode` trains on."""
    if mode != "imitation":
        return table
    # Not without the clause: the services always say positive, and a policy that never read it would be lost.
    return replace(table, indicator=np.full(len(table), conditioning.POSITIVE, np.int8))


def _rows(settings: PolicySettings, source: TableSource, mode: Mode) -> tuple[Rows, int]:
    """(step -> rows of its batch, frames that they are drawn from)."""
    size, seed, table = settings.fit.rows_per_step, settings.fit.seed, source.table
    positive = table.indicator == conditioning.POSITIVE
    if settings.cotrain_share is not None:
        if mode == "filtered" or settings.positive_share is not None:
            raise ValueError(
                "--cotrain-share: expected no other rule of what a batch is made of, got "
                + ("--mode filtered" if mode == "filtered" else "--positive-share")
            )
        groups = np.flatnonzero(source.demonstration), np.flatnonzero(~source.demonstration)
        names = ("demonstration", "rollout")
        balanced = BalancedSampler(*groups, size, settings.cotrain_share, seed, what="cotrain share", names=names)
        return balanced, len(table)
    if mode == "filtered":
        if not positive.any():
            raise ValueError(
                f"--mode filtered: expected positive frames to train on, got none among {len(table)}; read audit.html "
                "of the labels, or train with --mode recap"
            )
        return Sampler(np.flatnonzero(positive), size, seed), int(positive.sum())
    if mode == "recap" and settings.positive_share is not None:
        groups = np.flatnonzero(positive), np.flatnonzero(~positive)
        return BalancedSampler(*groups, size, settings.positive_share, seed), len(table)
    return Sampler(np.arange(len(table)), size, seed), len(table)


def _mixture(
    settings: PolicySettings, mixture: Mixture, labels: Path | None, init: Path | None, mode: Mode
) -> Prepared:
    if labels is not None:
        raise MixtureError(f"--labels: expected none beside --mixture, got {labels}; name labels in {mixture.path}")
    single = {
        "--positive-share": settings.positive_share is not None,
        "--cotrain-share": settings.cotrain_share is not None,
        "--action-groups": bool(settings.losses.action_groups),
    }
    if given := [flag for flag, is_given in single.items() if is_given]:
        raise MixtureError(f"{', '.join(given)}: expected none beside --mixture: it is for the data of one robot")
    sources = mixture_table.load_members(mixture, mode)
    policy, files, specs = start_mixture(settings, mixture, sources, init)
    table = mixture_table.stack(sources, specs, policy.config)
    rows = mixture_table.member_rows(mixture, sources, positive=mode == "filtered")
    steps = settings.fit.steps * settings.fit.rows_per_step
    parents: dict[str, str] = {}
    datasets: dict[str, dict[str, Any]] = {}
    for member, source, share, own in zip(mixture.members, sources, mixture.shares, rows, strict=True):
        parents |= {f"dataset/{member.name}": source.hash}
        parents |= {f"labels/{member.name}": source.labels_hash} if source.labels_hash else {}
        datasets[member.name] = {
            "share": float(share),
            "frames": len(own),
            "epochs": float(share) * steps / len(own),
            "positive_share": float((table.indicator[own] == conditioning.POSITIVE).mean()),
        }
    return Prepared(
        table,
        policy,
        files,
        mixture_table.MixtureSampler(rows, mixture.shares, settings.fit.rows_per_step, settings.fit.seed),
        sum(len(own) for own in rows),
        parents,
        {"serves": mixture.members[mixture.served].name, "shares": {n: d["share"] for n, d in datasets.items()}},
        {"datasets": datasets},
        {FILE: mixture_table.describe(mixture, sources)},
    )
