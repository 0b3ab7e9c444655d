"""Is the critic good enough to label with? Figures on episodes it has not trained on (DESIGN 2.2)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_model.statistics import auc, spearman
from training.loader import FrameTable

_PROGRESS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class EpisodeCurve:
    """One episode of T frames: value and target (the return), float64 [T]; index as in the dataset."""

    index: int
    task: str
    success: bool
    value: NDArray[np.float64]
    target: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Mean |V - return|."""
        return float(np.abs(self.value - self.target).mean())


def validation_report(table: FrameTable, values: NDArray[np.float64], rows: NDArray[np.int64]) -> dict[str, Any]:
    """Figures on the given rows.

    spearman: V against return on successful episodes; auc_*: success told from V at that share of the episode;
    calibration_error: mean |V - mean return| over ten bins of V, weighted by frames; calibration: those bins, see
    `calibration_bins`; failure_drop: mean change of V from the first to the last quarter of failed episodes (negative:
    the critic sees them fail); mae: mean |V - return|. None where undefined.
    """
    if not len(rows):
        return {"frames": 0}
    target, predicted, episode = table.target[rows].astype(float), values[rows], table.episode[rows]
    groups = [np.flatnonzero(episode == e) for e in np.unique(episode)]
    # A success ends at 0 exactly, a failure at -c_fail / T_max: the last return tells them apart.
    success = np.array([target[g[-1]] > -1e-6 for g in groups])
    report: dict[str, Any] = {"frames": len(rows), "episodes": len(groups), "successes": int(success.sum())}
    report["mae"] = float(np.abs(target - predicted).mean())
    good = np.concatenate([g for g, s in zip(groups, success, strict=True) if s] or [np.empty(0, int)])
    rank = float(spearman(predicted[good], target[good])) if len(good) > 2 else float("nan")
    report["spearman"] = None if np.isnan(rank) else rank
    for share in _PROGRESS:
        at = np.array([predicted[g[int(share * (len(g) - 1))]] for g in groups])
        both = 0 < success.sum() < len(groups)
        report[f"auc_{round(100 * share)}"] = float(auc(at, success)) if both else None
    report["calibration_error"] = calibration_error(predicted, target)
    report["calibration"] = calibration_bins(predicted, target)
    drops = [
        predicted[g[-len(g) // 4 :]].mean() - predicted[g[: max(len(g) // 4, 1)]].mean()
        for g, s in zip(groups, success, strict=True)
        if not s
    ]
    report["failure_drop"] = float(np.mean(drops)) if drops else None
    return report


def episode_curves(table: FrameTable, values: NDArray[np.float64], rows: NDArray[np.int64]) -> list[EpisodeCurve]:
    """The episodes among `rows` (whole episodes), those that the critic predicts best first."""
    curves = []
    for episode in np.unique(table.episode[rows]):
        mine = rows[table.episode[rows] == episode]
        target = table.target[mine].astype(float)
        curves.append(
            EpisodeCurve(int(episode), table.tasks[table.task[mine[0]]], bool(target[-1] > -1e-6), values[mine], target)
        )
    return sorted(curves, key=lambda curve: curve.error)


def calibration_bins(
    predicted: NDArray[np.float64], target: NDArray[np.float64], bins: int = 10
) -> list[dict[str, float]]:
    """One row for every bin of V that holds frames: its low and high end, frames, and the means of value and return."""
    which = np.clip(((predicted + 1) * bins).astype(int), 0, bins - 1)
    return [
        {
            "low": b / bins - 1,
            "high": (b + 1) / bins - 1,
            "frames": int((which == b).sum()),
            "value": float(predicted[which == b].mean()),
            "return": float(target[which == b].mean()),
        }
        for b in np.unique(which).tolist()
    ]


def calibration_error(predicted: NDArray[np.float64], target: NDArray[np.float64], bins: int = 10) -> float:
    """Expected calibration error of values in [-1, 0] against returns."""
    rows = calibration_bins(predicted, target, bins)
    return sum(row["frames"] * abs(row["value"] - row["return"]) for row in rows) / len(predicted)
