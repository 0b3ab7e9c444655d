"""Is the critic good enough to label with? Figures on episodes it has not trained on (DESIGN 2.2)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_model.statistics import auc, spearman
from training.loader import FrameTable

_PROGRESS = (0.25, 0.5, 0.75)


def validation_report(table: FrameTable, values: NDArray[np.float64], rows: NDArray[np.int64]) -> dict[str, Any]:
    """Figures on the given rows.

    spearman: V against return on successful episodes; auc_*: success told from V at that share of the episode;
    calibration_error: mean |V - mean return| over ten bins of V, weighted by frames; failure_drop: mean change of V
    from the first to the last quarter of failed episodes (negative: the critic sees them fail); mae: mean |V - return|.
    None where undefined.
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
    report["spearman"] = float(spearman(predicted[good], target[good])) if len(good) > 2 else None
    for share in _PROGRESS:
        at = np.array([predicted[g[int(share * (len(g) - 1))]] for g in groups])
        both = 0 < success.sum() < len(groups)
        report[f"auc_{round(100 * share)}"] = float(auc(at, success)) if both else None
    report["calibration_error"] = calibration_error(predicted, target)
    drops = [
        predicted[g[-len(g) // 4 :]].mean() - predicted[g[: max(len(g) // 4, 1)]].mean()
        for g, s in zip(groups, success, strict=True)
        if not s
    ]
    report["failure_drop"] = float(np.mean(drops)) if drops else None
    return report


def calibration_error(predicted: NDArray[np.float64], target: NDArray[np.float64], bins: int = 10) -> float:
    """Expected calibration error of values in [-1, 0] against returns."""
    which = np.clip(((predicted + 1) * bins).astype(int), 0, bins - 1)
    error = 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            error += inside.mean() * abs(predicted[inside].mean() - target[inside].mean())
    return float(error)
