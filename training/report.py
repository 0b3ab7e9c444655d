"""`recap report`: one page on a run of the loop, finished or not, that can be mailed and opened anywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from recap_client.rollout import Rollout, read_rollout
from recap_model.report import film, html, plots
from training.report_data import BASELINE, Arm, Run, against_baseline, known_values, read_headers, read_run


@dataclass(frozen=True)
class Report:
    """Write report.html of a loop: success and throughput, label audit, critics, value curves over film strips."""

    run: Path
    """Folder of `recap loop`, finished or not."""
    out: Path | None = None
    """File to write; RUN/report.html by default."""


def main(argv: list[str]) -> int:
    """`recap report`."""
    args = tyro.cli(Report, args=argv, prog="recap report", description=Report.__doc__)
    path = args.out or args.run / "report.html"
    html.write(path, build(read_run(args.run)))
    Console(highlight=False).print(str(path), soft_wrap=True)
    return 0


def build(run: Run) -> str:
    """The page as text."""
    done = len(run.seconds)
    subtitle = f"preset {run.preset}, {done} stages, {sum(run.seconds.values()) / 60:.0f} minutes"
    return html.page("RECAP loop", subtitle, _tiles(run), list(_sections(run)), "made by recap report")


def _sections(run: Run) -> Iterator[html.Section]:
    if run.arms:
        yield html.Section("Success and throughput", _comparison(run), "The same scenes and the same noise for every "
                           "policy. Bars carry 95 % intervals; throughput counts failures as lost time.")  # fmt: skip
        yield html.Section("Per task", _per_task(run.arms))
    if run.rollouts:
        headers = read_headers(run.rollouts)
        yield html.Section("Values over episodes", _films(headers), "Rollouts of the newest iteration. The critic's "
                           "value: 0 is done, -1 is as far as the longest success, or lost.")  # fmt: skip
        yield html.Section("All values", _curves(headers))
    for k, audit in run.audits.items():
        warnings = "".join(html.paragraph(text, "warning") for text in audit["warnings"])
        share = f"{audit['positive_share']:.1%} of the frames are positive; failed episodes supply "
        text = html.paragraph(share + f"{audit['failed_share']:.1%} of the positives.")
        body = text + warnings + html.figure(plots.audit_bars(audit["rows"]), "frames labelled positive and negative")
        yield html.Section(f"Label audit, iteration {k}", body)
    if run.critics:
        yield html.Section("Critics", _critics(run), "On episodes that the critic had not trained on. AUC: how often "
                           "the value ranks a success above a failure at that share of the episode.")  # fmt: skip
    if any("latency_s" in arm.overall for arm in run.arms):
        yield html.Section("Latency", _latency(run.arms))
    if run.curves:
        yield html.Section("Training", "".join(_training(name, rows) for name, rows in run.curves.items()))
    if run.seconds:
        rows = [(name, f"{seconds:.0f} s") for name, seconds in run.seconds.items()]
        yield html.Section("Stages", html.table(["stage", "duration"], rows))


def _tiles(run: Run) -> list[html.Tile]:
    recap = [arm for arm in run.arms if arm.name == "recap"]
    if not recap:
        return [html.Tile("stages finished", str(len(run.seconds)))]
    # fixed beforehand (last iteration, no guidance): the best of several on the same scenes would flatter itself
    shown = max(recap, key=lambda arm: (arm.iteration, -arm.beta))
    rate, (low, high) = shown.overall["success_rate"], shown.overall["success_rate_95"]
    tiles = [
        html.Tile("success of RECAP", f"{rate:.0%}", f"95 % interval {low:.0%} to {high:.0%}"),
        html.Tile("successes a minute", f"{shown.overall['throughput_per_minute']:.1f}", shown.title),
    ]
    ratio = against_baseline(shown, run.arms)
    if ratio is not None:
        value, low, high = ratio
        tone = "good" if low > 1 else ("bad" if high < 1 else "")
        hint = f"95 % interval {low:.2f} to {high:.2f}"
        tiles.append(html.Tile("throughput over plain imitation", f"{value:.2f}x", hint, tone))
    return tiles


def _comparison(run: Run) -> str:
    bars = [
        plots.Arm(arm.title, plots.Interval(arm.overall["success_rate"], *arm.overall["success_rate_95"]),
                  plots.Interval(arm.overall["throughput_per_minute"], *arm.overall["throughput_per_minute_95"]),
                  highlight=arm.name == "recap")
        for arm in run.arms
    ]  # fmt: skip
    rows = []
    for arm in run.arms:
        overall, ratio = arm.overall, against_baseline(arm, run.arms)
        against = "1 (the baseline)" if arm.name == BASELINE else "-"
        if ratio is not None:
            against = f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"
        success, flow = overall["success_rate_95"], overall["throughput_per_minute_95"]
        rows.append([
            arm.title, overall["episodes"], f"{overall['success_rate']:.3f} [{success[0]:.3f}, {success[1]:.3f}]",
            f"{overall['throughput_per_minute']:.2f} [{flow[0]:.2f}, {flow[1]:.2f}]", against,
        ])  # fmt: skip
    head = ["policy", "episodes", "success rate", "successes per minute", "throughput over plain imitation"]
    return html.figure(plots.comparison(bars), "every evaluated policy") + html.table(head, rows)


def _per_task(arms: Sequence[Arm]) -> str:
    names = list(dict.fromkeys(name for arm in arms for name in arm.evaluation["tasks"]))
    rows = []
    for arm in arms:
        tasks = [arm.evaluation["tasks"].get(name) for name in names]
        rows.append([arm.title, *(_task_cell(task) for task in tasks)])
    return html.table(["policy", *names], rows)


def _task_cell(task: dict[str, float] | None) -> str:
    if task is None:
        return "-"
    steps = task.get("mean_steps_success")
    return f"{task['successes']} of {task['episodes']}" + (f", {steps:.0f} steps" if steps else "")


def _films(rollouts: Sequence[Rollout]) -> str:
    judged = [rollout for rollout in rollouts if np.isfinite(rollout.value).any()]
    groups = [
        [rollout for rollout in judged if rollout.intervention.any()],
        [rollout for rollout in judged if rollout.success is False and not rollout.intervention.any()],
    ] + [
        [rollout for rollout in judged if rollout.success and not rollout.intervention.any() and rollout.task == task]
        for task in dict.fromkeys(rollout.task for rollout in judged)
    ]
    chosen = [group[len(group) // 2] for group in groups if group]
    if not chosen:
        return html.paragraph("These rollouts were recorded without values.")
    return "".join(_film(rollout) for rollout in sorted(chosen, key=lambda rollout: rollout.task))


def _film(header: Rollout) -> str:
    rollout = read_rollout(header.path)
    if not rollout.images:
        return ""
    ending = "success" if rollout.success else rollout.reason
    title = f"{rollout.task}: {ending} after {rollout.steps / rollout.control_hz:.1f} s"
    if rollout.intervention.any():
        title += ", with a human takeover"
    frames = next(iter(rollout.images.values()))
    picture = film.film_strip(frames, known_values(rollout), title=title, control_hz=rollout.control_hz,
                              success=rollout.success, intervention=rollout.intervention)  # fmt: skip
    return html.figure(picture, f"{title} (seed {rollout.seed})")


def _curves(rollouts: Sequence[Rollout]) -> str:
    curves = [
        plots.Curve(known_values(rollout), rollout.success)
        for rollout in rollouts
        if rollout.steps > 1 and np.isfinite(rollout.value).any()
    ]
    return html.figure(plots.value_curves(curves), f"value over {len(curves)} rollouts")


def _critics(run: Run) -> str:
    names = ["episodes", "spearman", "auc_25", "auc_50", "auc_75", "calibration_error", "failure_drop", "mae"]
    rows = [[k, *("-" if metrics.get(name) is None else metrics[name] for name in names)]
            for k, metrics in run.critics.items()]  # fmt: skip
    return html.table(["iteration", *(name.replace("_", " ") for name in names)], rows)


def _latency(arms: Sequence[Arm]) -> str:
    every = [s for arm in arms for row in arm.evaluation["episodes"] for s in row.get("act_latency_s") or ()]
    period_ms = 1e3 / arms[0].evaluation["control_hz"]
    rows = []
    for arm in arms:
        latency = arm.overall["latency_s"]
        cells = (latency["p50"], latency["p90"], latency["p99"])
        rows.append([arm.title, latency["n"], *("-" if cell is None else f"{1e3 * cell:.1f} ms" for cell in cells)])
    picture = plots.latency_histogram(1e3 * np.array(every, float), period_ms=period_ms, count="requests")
    return html.figure(picture, "latency of every request, several robots at once") + html.table(
        ["policy", "requests", "p50", "p90", "p99"], rows
    )


def _training(name: str, rows: Sequence[dict[str, float]]) -> str:
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "step"][:6]
    series = {
        key: (np.array([row["step"] for row in rows if key in row], float),
              np.array([row[key] for row in rows if key in row], float))
        for key in keys
    }  # fmt: skip
    return html.figure(plots.training_curves(series), f"training of {name}")
