"""report.html of a critic: is it good enough to label with, and where is it wrong?"""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from recap_model.report import html
from training.critic_report import EpisodeCurve
from training.labels import critic_warnings

_SHOWN = 4
_FIGURES = (
    ("spearman", "rank correlation with the return", "on successes; 1 is perfect"),
    ("auc_25", "AUC of success at 25 %", "0.5 is chance"),
    ("auc_50", "AUC of success at 50 %", "0.5 is chance"),
    ("auc_75", "AUC of success at 75 %", "0.5 is chance"),
    ("calibration_error", "calibration error", "mean |V - return| over bins"),
    ("failure_drop", "change of V on failures", "first to last quarter; below 0 is right"),
)


def render(title: str, report: Mapping[str, Any], curves: Sequence[EpisodeCurve], *, folds: int) -> str:
    """The page as text. report: of `validation_report`; curves: best predicted first. Without matplotlib there are no
    pictures, and the page says how to get them."""
    how = f"values by {folds} critics, each blind to its fold" if folds > 1 else "held out from training"
    subtitle = f"{report.get('episodes', 0)} episodes, {report.get('frames', 0)} frames, {how}"
    tiles = [
        html.Tile(label, "-" if report.get(name) is None else f"{report[name]:.2f}", hint)
        for name, label, hint in _FIGURES
    ]
    return html.page(f"Critic {title}", subtitle, tiles, list(_sections(report, curves)), "made by recap train critic")


def _sections(report: Mapping[str, Any], curves: Sequence[EpisodeCurve]) -> Iterator[html.Section]:
    warnings = [*critic_warnings(report, 0.0)]
    if warnings:
        yield html.Section("Warnings", "".join(html.paragraph(text, "warning") for text in warnings))
    if not curves:
        yield html.Section("Nothing to judge by", html.paragraph("No episode was held out: train with --folds 2."))
        return
    rows = [[f"{b['low']:.1f} to {b['high']:.1f}", *(b[k] for k in ("frames", "value", "return"))]
            for b in report["calibration"]]  # fmt: skip
    table = html.table(["values", "frames", "mean value", "mean return"], rows)
    try:
        plots, own = (import_module(f"recap_model.report.{name}") for name in ("plots", "critic_plots"))
    except ModuleNotFoundError as error:
        yield html.Section("Calibration", table)
        missing = f"No pictures: the package {error.name!r} is missing; `pip install 'recap-stack[report]'` brings it."
        yield html.Section("Values over episodes", html.paragraph(missing, "warning") + _listed(curves))
        return
    yield html.Section("Calibration", html.figure(own.calibration(report["calibration"]), "return over value") + table)
    every = [plots.Curve(curve.value, curve.success, str(curve.index)) for curve in curves]
    yield html.Section("All values", html.figure(plots.value_curves(every[:: -(-len(every) // 60)]), "all episodes"))
    for name, chosen in (("Best", curves[:_SHOWN]), ("Worst", curves[:-_SHOWN - 1:-1])):  # fmt: skip
        drawn = [own.ValueAndReturn(c.value, c.target, c.success, _title(c)) for c in chosen]
        note = f"By mean |V - return|. Line: value (green: success, red: failure). Dashes: return. {name} first."
        yield html.Section(f"{name} predicted episodes", html.figure(own.episodes(drawn), "value and return"), note)
    yield html.Section("Episodes", _listed(curves))


def _listed(curves: Sequence[EpisodeCurve]) -> str:
    """The best and the worst as a table."""
    chosen = [*curves[:_SHOWN], *curves[max(_SHOWN, len(curves) - _SHOWN) :]]
    rows = [[c.index, c.task, "success" if c.success else "failure", len(c.value), c.error, float(c.value[0]),
             float(c.value[-1])] for c in chosen]  # fmt: skip
    return html.table(["episode", "task", "outcome", "frames", "mean |V - return|", "first V", "last V"], rows)


def _title(curve: EpisodeCurve) -> str:
    return f"episode {curve.index}, error {curve.error:.2f}"
