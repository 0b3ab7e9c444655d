"""Offline action error as a table, as JSON and as a page with bars."""

import io
import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from recap_model.report import html
from recap_model.report.plots import ACCENT, BAD, GOOD, HUMAN, SOFT
from training.offline import ALL, HORIZONS, PROMPTS, OfflineReport, mean_known
from training.view_page import NEUTRAL, inline_svg, light_and_dark, style

_WORDS = {"first": "first action", "chunk": "whole chunk"}
_COLOURS = {"positive": GOOD, "negative": BAD, "none": NEUTRAL}
_NOTE = (
    "Errors against the recorded actions, with the same noise for every prompt. R2 is 1 for an exact prediction and 0 "
    "for one that always says the mean of the actions in its row; it is empty where the action has no spread."
)
_EFFECT_NOTE = (
    "Mean absolute difference between the chunks that the same frames get under two prompts, in standard deviations of "
    "the action. Far below what another noise changes (the bar called noise), the policy hardly reads its prompt."
)


def summary_table(report: OfflineReport) -> Table:
    """One row a prompt, label and horizon; means over the action's dimensions."""
    table = Table(title=f"offline action error, {report.frames} frames, chunks of {report.chunk}")
    for name in ("prompt", "label of the frame", "horizon"):
        table.add_column(name)
    for name in ("actions", "MAE [std]", "MSE [std^2]", "R2"):
        table.add_column(name, justify="right")
    for (prompt, label, horizon), found in report.errors.items():
        table.add_row(prompt, label, _WORDS[horizon], str(found.count), _text(mean_known(found.relative_mae)),
                      _text(mean_known(found.relative_mse)), _text(mean_known(found.r2)))  # fmt: skip
    return table


def dimension_table(report: OfflineReport) -> Table:
    """One row an action dimension and prompt, all labels together."""
    table = Table(title="by action dimension, all frames")
    table.add_column("action", overflow="fold")
    table.add_column("prompt")
    for horizon in HORIZONS:
        for name in ("MAE", "MSE", "R2"):
            table.add_column(f"{_WORDS[horizon].split()[1]} {name}", justify="right")
    for number, name in enumerate(_titles(report)):
        for prompt in report.settings.prompts:
            found = [report.errors[prompt, ALL, horizon] for horizon in HORIZONS]
            figures = [float(values[number]) for part in found for values in (part.mae, part.mse, part.r2)]
            table.add_row(name, prompt, *map(_text, figures))
    return table


def effect_lines(report: OfflineReport) -> list[str]:
    """What the prompt changes, in words."""
    return [
        f"{name}: {_text(effect.mean)} standard deviations of the action"
        + (" (same prompt, another noise)" if name == "noise" else "")
        for name, effect in report.effects.items()
    ]


def to_json(report: OfflineReport) -> dict[str, Any]:
    """Everything, with null for what is undefined. errors: prompt -> label -> horizon -> figures by dimension."""
    errors: dict[str, Any] = {}
    for (prompt, label, horizon), found in report.errors.items():
        errors.setdefault(prompt, {}).setdefault(label, {})[horizon] = {
            "count": found.count, "mae_std": _number(mean_known(found.relative_mae)),
            "mse_std": _number(mean_known(found.relative_mse)),
            "mae": _named(report, found.mae), "mse": _named(report, found.mse), "r2": _named(report, found.r2),
        }  # fmt: skip
    settings = report.settings
    return {
        "checkpoint": report.checkpoint, "dataset": report.dataset, "labels": report.labels or None,
        "frames": report.frames, "chunk": report.chunk, "prompts": list(settings.prompts), "beta": settings.beta,
        "seed": settings.seed, "noise_seeds": list(settings.noise_seeds),
        "units": dict(zip(report.names, report.units, strict=True)), "errors": errors,
        "effects_std": {
            name: {"mean": _number(effect.mean), **_named(report, effect.per_dimension)}
            for name, effect in report.effects.items()
        },
    }  # fmt: skip


def build_page(report: OfflineReport) -> str:
    """The page as text, legible in light and dark."""
    sections = []
    if len(report.effects) > 0:
        chart = bars({name: effect.per_dimension for name, effect in report.effects.items()}, report.names,
                     "difference [std]")  # fmt: skip
        rows = [[name, _text(effect.mean)] for name, effect in report.effects.items()]
        body = inline_svg(chart, "what the prompt changes, by action dimension") + html.table(["pair", "mean"], rows)
        sections.append(html.Section("Does the prompt matter?", body, _EFFECT_NOTE))
    labels = [label for label in (ALL, *PROMPTS) if any(key[1] == label for key in report.errors)]
    if len(labels) == 2:  # one label alone is all there is
        labels = [ALL]
    for label in labels:
        title = "All frames" if label == ALL else f"Frames labelled {label}"
        sections.append(html.Section(title, "".join(_horizon(report, label, h) for h in HORIZONS), _NOTE))
    settings = report.settings
    text = (f"policy {report.checkpoint[:12]}, dataset {report.dataset[:12]}, {report.frames} frames, chunks of "
            f"{report.chunk}, guidance {settings.beta:g}, {len(settings.noise_seeds)} noise seeds")  # fmt: skip
    return light_and_dark(html.page("Offline action error", text, _tiles(report), sections, "made by recap offline"))


def bars(groups: dict[str, NDArray[Any]], names: tuple[str, ...], label: str) -> bytes:
    """SVG of grouped bars: one group an action dimension, one bar each of `groups` (name -> [A]); NaN is left out."""
    fallback = iter((ACCENT, HUMAN, SOFT))
    colours = {name: _COLOURS.get(name) or (NEUTRAL if name == "noise" else next(fallback)) for name in groups}
    width = 0.8 / len(groups)
    with style():
        chart = Figure(figsize=(10, 2.6), dpi=72, layout="constrained")
        axes = chart.subplots()
        for number, (name, values) in enumerate(groups.items()):
            at = np.arange(len(values)) + (number - (len(groups) - 1) / 2) * width
            axes.bar(at, np.nan_to_num(values), width * 0.92, color=colours[name], label=name)
        axes.set_xticks(np.arange(len(names)), [_short(name) for name in names],
                        rotation=0 if len(names) <= 8 else 45, ha="center" if len(names) <= 8 else "right")  # fmt: skip
        axes.set_ylabel(label)
        axes.grid(axis="x", visible=False)
        chart.legend(frameon=False, loc="outside upper right", ncols=len(groups))
        stream = io.BytesIO()
        chart.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    return stream.getvalue()


def _horizon(report: OfflineReport, label: str, horizon: str) -> str:
    found = {prompt: report.errors[prompt, label, horizon] for prompt in report.settings.prompts}
    chart = bars({prompt: part.relative_mae for prompt, part in found.items()}, report.names, "MAE [std]")
    count = next(iter(found.values())).count
    head = ["action", *(f"{prompt} {name}" for prompt in found for name in ("MAE", "MSE", "R2"))]
    caption = f"{_WORDS[horizon]}: mean absolute error in standard deviations of the action, {count} actions"
    return inline_svg(chart, caption) + html.table(head, _dimension_rows(report, label, horizon))


def _dimension_rows(report: OfflineReport, label: str, horizon: str) -> list[list[str]]:
    rows = []
    for number, name in enumerate(_titles(report)):
        row = [name]
        for prompt in report.settings.prompts:
            found = report.errors[prompt, label, horizon]
            row += [_text(float(values[number])) for values in (found.mae, found.mse, found.r2)]
        rows.append(row)
    return rows


def _titles(report: OfflineReport) -> list[str]:
    """Names of the action's dimensions with their units."""
    named = zip(report.names, report.units, strict=True)
    return [name if unit in ("", "1") else f"{name} [{unit}]" for name, unit in named]


def _tiles(report: OfflineReport) -> list[html.Tile]:
    served = "positive" if "positive" in report.settings.prompts else report.settings.prompts[0]
    tiles = [
        html.Tile(f"MAE [std], {_WORDS[horizon]}", _text(mean_known(report.errors[served, ALL, horizon].relative_mae)),
                  f"prompt {served}, all frames")
        for horizon in HORIZONS
    ]  # fmt: skip
    return tiles + [
        html.Tile(name, _text(effect.mean), "standard deviations of the action")
        for name, effect in report.effects.items()
        if name in ("positive against negative", "noise")
    ]


def _named(report: OfflineReport, values: NDArray[Any]) -> dict[str, float | None]:
    return {name: _number(float(value)) for name, value in zip(report.names, values, strict=True)}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def _short(text: str, limit: int = 16) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
