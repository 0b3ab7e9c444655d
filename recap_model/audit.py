"""The label audit: which frames became positive, before hours of training are spent on them. numpy only.

One row per (task, demonstration, success, intervention); warnings for the mistakes that are common in practice.
"""

import html
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_model.advantage import Frames, LabelRules, Labels
from recap_model.conditioning import NONE, POSITIVE
from recap_model.returns import Floats

FAILED_POSITIVE_LIMIT = 0.10
COLUMNS = (
    "task",
    "episodes of",
    "outcome",
    "frames by",
    "episodes",
    "frames",
    "positive",
    "negative",
    "positive share",
    "mean advantage",
)


@dataclass(frozen=True)
class Row:
    """Counts of frames of one kind; share = positive / frames; advantage = mean over these frames, None where labels
    were imported without; none = frames without an indicator."""

    task: str
    demonstration: bool
    success: bool
    intervention: bool
    episodes: int
    frames: int
    positive: int
    advantage: float | None
    none: int = 0

    @property
    def negative(self) -> int:
        return self.frames - self.positive - self.none

    @property
    def share(self) -> float:
        return self.positive / self.frames if self.frames else 0.0


@dataclass(frozen=True)
class Audit:
    """failed_share: of all positive frames, those in failed episodes. sources: frames labelled by each rule."""

    rows: tuple[Row, ...]
    sources: dict[str, int]
    positive_share: float
    failed_share: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "negative": row.negative, "share": row.share} for row in self.rows]
        return {**asdict(self), "rows": rows, "warnings": list(self.warnings)}


def audit(frames: Frames, advantages: Floats, labels: Labels, rules: LabelRules) -> Audit:
    """Count labels [F] by task, demonstration, success and intervention, and say what looks wrong."""
    positive = labels.indicator == POSITIVE
    rows = []
    for task in sorted(set(frames.task)):
        for demonstration, success, intervention in np.ndindex(2, 2, 2):
            mask = (
                (frames.task == task)
                & (frames.demonstration == bool(demonstration))
                & (frames.success == bool(success))
                & (frames.intervention == bool(intervention))
            )
            if mask.any():
                rows.append(
                    Row(
                        str(task),
                        bool(demonstration),
                        bool(success),
                        bool(intervention),
                        len(np.unique(frames.episode[mask])),
                        int(mask.sum()),
                        int(positive[mask].sum()),
                        float(advantages[mask].mean()) if np.isfinite(advantages[mask]).all() else None,
                        int((labels.indicator[mask] == NONE).sum()),
                    )
                )
    failed = float((positive & ~frames.success).sum() / max(1, positive.sum()))
    names, counts = np.unique(labels.source.astype(str), return_counts=True)
    return Audit(
        tuple(rows),
        dict(zip(names.tolist(), counts.tolist(), strict=True)),
        float(positive.mean()),
        failed,
        tuple(_warnings(frames, labels, positive, failed, rules)),
    )


def _warnings(
    frames: Frames, labels: Labels, positive: NDArray[np.bool_], failed: float, rules: LabelRules
) -> Iterable[str]:
    if failed > FAILED_POSITIVE_LIMIT:
        forced = (positive & ~frames.success & (labels.source == "intervention")).sum() / max(1, positive.sum())
        yield (
            f"failed episodes supply {failed:.0%} of the positive frames (limit {FAILED_POSITIVE_LIMIT:.0%}; "
            f"{forced:.0%} are interventions): consider --failures-negative or --interventions successes"
        )
    if not positive.any():
        yield "no frame is positive: the policy is served with `positive`, which it would never have seen"
    elif positive.all() and rules.mode in ("computed", "imported"):
        yield "every frame is positive: the indicator carries no information"
    if (bare := float((labels.indicator == NONE).mean())) > 0:
        yield f"{bare:.0%} of the frames have no indicator: the policy is trained on them without the advantage clause"
    if rules.mode != "computed":
        return
    yield from _rule_warnings(labels, positive, rules)
    for task in sorted(set(frames.task)):
        for demonstration, asked in ((False, rules.positive_fraction), (True, rules.demonstration_fraction)):
            group = (frames.task == task) & (frames.demonstration == demonstration) & (labels.source == "computed")
            got = float(positive[group].mean()) if group.any() else asked
            whole = rules.threshold_over == "all" and rules.threshold_scope == "task" and not rules.failures_negative
            if whole and got < asked / 2 and group.sum() >= 20:
                kind = "demonstrations" if demonstration else "rollouts"
                yield (
                    f"task {task!r}: {got:.0%} of the {kind} are positive where {asked:.0%} were asked for: many "
                    "equal advantages, so the critic does not tell these frames apart"
                )
    if rules.n is not None and rules.estimator == "n-step":
        short = np.array([rows.stop - rows.start <= rules.n for rows in frames.episodes()])
        if short.mean() > 0.5:
            yield (
                f"{short.mean():.0%} of the episodes are no longer than n = {rules.n} frames: their advantages use "
                "no look-ahead value"
            )


def _rule_warnings(labels: Labels, positive: NDArray[np.bool_], rules: LabelRules) -> Iterable[str]:
    """What the choice of rules does whatever the data are."""
    if rules.estimator == "gae" and rules.gamma < 1:
        yield (
            f"gamma {rules.gamma:g}: the critic's values are not discounted, so frames far from success (V near -1) "
            f"gain {1 - rules.gamma:.2g} a step for nothing: use --gamma 1"
        )
    computed = labels.source == "computed"
    got = float(positive[computed].mean()) if computed.any() else 0.0
    if rules.threshold_rule == "percentile" and got > 1.25 * max(rules.positive_fraction, rules.demonstration_fraction):
        yield (
            f"{got:.0%} of the compared frames are positive where {rules.positive_fraction:.0%} were asked for: equal "
            "advantages at the threshold all count; --threshold-rule above leaves them out"
        )


def render_html(result: Audit, *, title: str) -> str:
    """A page that needs no other file."""
    body = "".join(_html_row(row) for row in result.rows)
    warnings = "".join(f"<p class='warning'>{html.escape(text)}</p>" for text in result.warnings)
    sources = ", ".join(f"{name} {count}" for name, count in sorted(result.sources.items()))
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}"
        f"</style><h1>{html.escape(title)}</h1><p>{result.positive_share:.1%} of the frames are positive; failed "
        f"episodes supply {result.failed_share:.1%} of the positives. Labelled by: {html.escape(sources)}.</p>"
        f"{warnings}<table><tr>{''.join(f'<th>{name}</th>' for name in COLUMNS)}</tr>{body}</table></html>\n"
    )


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of the table's columns."""
    return (
        row.task,
        "demonstration" if row.demonstration else "rollout",
        "success" if row.success else "failure",
        "human" if row.intervention or row.demonstration else "policy",
        str(row.episodes),
        str(row.frames),
        str(row.positive),
        str(row.negative),
        f"{row.share:.0%}",
        "-" if row.advantage is None else f"{row.advantage:+.3f}",
    )


def _html_row(row: Row) -> str:
    columns = "".join(f"<td>{html.escape(text)}</td>" for text in cells(row))
    return f"<tr>{columns}<td><div class='bar' style='width:{row.share * 120:.0f}px'></div></td></tr>"


_STYLE = (
    "body{font:15px system-ui;margin:2em;color:#222}table{border-collapse:collapse}"
    "td,th{padding:.3em .8em;text-align:left;border-bottom:1px solid #ddd}"
    ".warning{background:#fff3cd;border-left:4px solid #e0a800;padding:.5em 1em}"
    ".bar{height:.8em;background:#4a90d9}"
)
