"""report.html and video.mp4 of a demo."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recap_client.record import read_rollout
from recap_client.rollout import Rollout
from recap_model.report import film, html, plots, video
from recap_model.statistics import wilson
from services.demo.summary import Episode, Summary, latencies_ms
from services.demo.values import values_at

_CLIPS_A_TASK, _DRILL_CLIPS = 2, 2
_EMBEDDED_BYTES = 12_000_000


def write_video(path: Path, episodes: Sequence[Episode], *, control_hz: float) -> None:
    """Two episodes of each task (a failure among them, if there is one) and two fault drills."""
    chosen = [item for task in _tasks(episodes) for item in _choice(episodes, task, _CLIPS_A_TASK)]
    chosen += [item for item in episodes if item.drill][:_DRILL_CLIPS]
    video.write_video(path, (_clip(item) for item in chosen), fps=control_hz)


def write_report(
    path: Path, summary: Summary, episodes: Sequence[Episode], *, control_hz: float, models: dict[str, str], mp4: Path
) -> None:
    """The page; pictures and the video are inside it."""
    period_ms = 1e3 / control_hz
    sections = [
        html.Section("Tasks", _task_part(episodes), "Every task is given to the policy in words; it sees two cameras "
                     "and its own gripper, never the positions of objects."),
        html.Section("Episodes", _film_part(episodes, control_hz), "Under each strip: the value that the critic "
                     "service gave while the arm moved. 0 is done; -1 is as far away as the longest success, or lost."),
        html.Section("What the critic knew", _value_part(summary, episodes), "In the fault drills the motors do not "
                     "follow the commands. They do not count as episodes; the critic has to recognise them."),
        html.Section("Latency", html.figure(plots.latency_histogram(latencies_ms(episodes), period_ms=period_ms),
                     "request to action chunk, measured at the robot"), _latency_note(summary, episodes)),
        html.Section("Every episode", _table(episodes)),
        html.Section("Models", html.table(["model", "content hash"], sorted(models.items()))),
    ]  # fmt: skip
    if mp4.exists() and mp4.stat().st_size <= _EMBEDDED_BYTES:
        sections.insert(1, html.Section("Video", html.video(mp4.read_bytes(), "real time, value curve below")))
    tiles = _tiles(summary, episodes, period_ms)
    html.write(path, html.page("RECAP demo", _subtitle(summary, control_hz), tiles, sections, "made by recap demo"))


def _subtitle(summary: Summary, control_hz: float) -> str:
    return (
        f"{summary.episodes} episodes of a simulated arm, driven over a websocket at {control_hz:.0f} Hz by a policy "
        "that is always asked for its better half"
    )


def _tiles(summary: Summary, episodes: Sequence[Episode], period_ms: float) -> list[html.Tile]:
    good = sum(item.success for item in episodes if not item.drill)
    low, high = wilson(good, summary.episodes)
    steps = sum(item.result.steps for item in episodes if not item.drill)
    share = summary.deadline_misses / max(1, steps)
    auc = "-" if summary.value_auc is None else f"{summary.value_auc:.2f}"
    return [
        html.Tile("success", f"{summary.success_rate:.0%}", f"95 % interval {low:.0%} to {high:.0%}",
                  "good" if summary.success_rate >= 0.8 else "bad"),
        html.Tile("control rate", f"{summary.control_hz:.1f} Hz", f"{steps} control steps"),
        html.Tile("act latency p50", f"{summary.act_p50_ms:.1f} ms", f"p99 {summary.act_p99_ms:.1f} ms",
                  "good" if summary.act_p99_ms < period_ms else "bad"),
        html.Tile("missed deadlines", f"{share:.2%}", f"{summary.deadline_misses} steps",
                  "good" if share <= 0.01 else "bad"),
        html.Tile("value AUC", auc, "success told from failure half-way"),
    ]  # fmt: skip


def _task_part(episodes: Sequence[Episode]) -> str:
    arms, rows = [], []
    for task in _tasks(episodes):
        ended = [item for item in episodes if item.result.task == task and not item.drill]
        good = [item for item in ended if item.success]
        arms.append(plots.Arm(task, plots.Interval(len(good) / len(ended), *wilson(len(good), len(ended)))))
        seconds = float(np.mean([item.span_s for item in good])) if good else float("nan")
        rows.append([task, f"{len(good)} of {len(ended)}", f"{seconds:.2f} s" if good else "-"])
    return html.figure(plots.comparison(arms), "success with 95 % intervals") + html.table(
        ["prompt", "successes", "mean time to success"], rows
    )


def _film_part(episodes: Sequence[Episode], control_hz: float) -> str:
    chosen = [item for task in _tasks(episodes) for item in _choice(episodes, task, 1)]
    chosen += [item for item in episodes if not item.drill and not item.success and item not in chosen][:1]
    chosen += [item for item in episodes if item.drill][:1]
    strips = []
    for item in chosen:
        rollout = _rollout(item)
        frames = next(iter(rollout.images.values()))
        title = f"{item.result.task}: {_ending(item)}"
        picture = film.film_strip(
            frames,
            values_at(list(item.values), rollout.steps),
            title=title,
            control_hz=control_hz,
            success=item.success,
        )
        strips.append(html.figure(picture, f"{title}, seed {item.result.seed}"))
    return "".join(strips)


def _value_part(summary: Summary, episodes: Sequence[Episode]) -> str:
    curves = [plots.Curve(values_at(list(item.values), item.result.steps), item.success) for item in episodes]
    known = [curve for curve in curves if len(curve.values) and np.isfinite(curve.values).all()]
    text = (
        "All episodes ended alike, so there is nothing to tell apart."
        if summary.value_auc is None
        else f"Half-way through, the value ranks a success above a failure {summary.value_auc:.0%} of the time."
    )
    return html.paragraph(text) + html.figure(plots.value_curves(known), "value of every episode and drill")


def _latency_note(summary: Summary, episodes: Sequence[Episode]) -> str:
    steps = sum(item.result.steps for item in episodes if not item.drill)
    share = summary.deadline_misses / max(1, steps)
    return f"{summary.deadline_misses} of {steps} control steps ({share:.2%}) did not get a fresh action in time."


def _table(episodes: Sequence[Episode]) -> str:
    rows = [
        [item.result.episode, item.result.task, _ending(item), item.result.steps, item.result.missed_deadlines,
         "alarm" if item.alarm else ""]
        for item in episodes
    ]  # fmt: skip
    return html.table(["episode", "prompt", "outcome", "steps", "late", "critic"], rows)


def _ending(item: Episode) -> str:
    verdict = f"success in {item.span_s:.1f} s" if item.success else item.result.reason
    return f"fault drill, {verdict}" if item.drill else verdict


def _tasks(episodes: Sequence[Episode]) -> list[str]:
    return list(dict.fromkeys(item.result.task for item in episodes if not item.drill))


def _choice(episodes: Sequence[Episode], task: str, count: int) -> list[Episode]:
    """The first successes of a task; the last place goes to a failure when there is one and room for both."""
    ended = [item for item in episodes if item.result.task == task and not item.drill]
    good, bad = [item for item in ended if item.success], [item for item in ended if not item.success]
    return (good[: count - 1] + bad[:1] if bad and count > 1 else good[:count]) or bad[:count]


def _clip(item: Episode) -> video.Clip:
    rollout = _rollout(item)
    title = f"{item.result.task}{' (fault drill)' if item.drill else ''}"
    return video.Clip(title, rollout.images, values_at(list(item.values), rollout.steps), item.success)


def _rollout(item: Episode) -> Rollout:
    assert item.result.recording is not None
    return read_rollout(Path(item.result.recording))
