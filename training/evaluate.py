"""`recap collect` and `recap evaluate`: episodes on a simulated robot, recorded as data or counted as evidence."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from recap_client.fleet import FleetSettings, jobs_for, run_fleet
from recap_client.intervention import TakeoverRule
from recap_client.robots.metaworld import TASKS
from recap_client.robots.registry import open_robot
from recap_client.runtime import EpisodeResult, LoopSettings
from recap_model.statistics import auc, bootstrap_ratio, wilson

NAME = "evaluation.json"
SCHEMA = 1
ROLLOUT_SEED, EVALUATION_SEED = 50_000, 100_000
"""Where seeds start: demonstrations at 0, rollouts and evaluations far from them and from each other."""


class EvaluationError(ValueError):
    """What was asked for cannot be collected or evaluated."""


@dataclass(frozen=True)
class Episodes:
    """Which episodes, on which robot."""

    out: Annotated[Path, tyro.conf.arg(help="folder to write into")]
    tasks: tuple[str, ...] = tuple(TASKS)[:3]
    """Names or prompts of the robot's tasks."""
    episodes_per_task: int = 20
    first_seed: int | None = None
    """Seed of the first episode of each task; the scene depends on it alone. Default: 0 for demonstrations, 50000 for
    rollouts, 100000 for evaluations."""
    robot: str = "metaworld"
    """Name, or package.module:Class."""
    policy_url: str | None = None
    """Policy service, e.g. ws://127.0.0.1:8000/act."""
    value_url: str | None = None
    """Critic service, e.g. ws://127.0.0.1:8001/value."""
    execute: int = 4
    """Actions of a chunk before asking again."""
    workers: int = 2
    """Robots at once, one process each."""
    realtime: bool = False
    """Keep the control rate, else as fast as the simulator goes."""


@dataclass(frozen=True)
class Collect:
    """Record episodes as MCAP files. Run the same command again after an interruption: finished ones are kept."""

    episodes: tyro.conf.OmitArgPrefixes[Episodes]
    demonstrations: bool = False
    """The robot's human acts; no service is needed."""
    style: str = "mixed"
    """How the scripted human demonstrates: mixed, clean, fast, slow, detour or bad."""
    intervene: float = 0.0
    """Probability that an operator watches an episode, and takes over when the value stands still."""


@dataclass(frozen=True)
class Evaluate:
    """Success rate and throughput of a served policy; writes evaluation.json."""

    episodes: tyro.conf.OmitArgPrefixes[Episodes]
    record: Literal["none", "all"] = "none"
    """all: keep the episodes as MCAP files under OUT/rollouts (and resume from them)."""


def collect(argv: list[str]) -> int:
    """`recap collect`."""
    args = tyro.cli(Collect, args=argv, prog="recap collect")
    console = Console()
    results = collect_episodes(args, console)
    console.print(summary_table(results))
    failed = [result.record_error for result in results if result.record_error]
    for problem in failed:
        console.print(f"[red]{problem}")
    return 1 if failed else 0


def evaluate(argv: list[str]) -> int:
    """`recap evaluate`."""
    args = tyro.cli(Evaluate, args=argv, prog="recap evaluate")
    console = Console()
    report = evaluate_policy(args, console)
    overall = report["overall"]
    low, high = overall["success_rate_95"]
    pace = overall["throughput_per_minute"]
    console.print(f"success {overall['success_rate']:.3f} [{low:.3f}, {high:.3f}], throughput {pace:.2f} per minute of "
                  f"robot time; {args.episodes.out / NAME}")  # fmt: skip
    print(json.dumps({key: overall[key] for key in ("episodes", "success_rate", "throughput_per_minute")}))
    return 0


def collect_episodes(args: Collect, console: Console | None = None) -> list[EpisodeResult]:
    """Record `args` into `<out>/*.mcap`; returns one result per episode. Raises EvaluationError, FleetError, ..."""
    episodes = args.episodes
    if args.demonstrations == (episodes.policy_url is not None):
        raise EvaluationError("collect: expected either --demonstrations or --policy-url; got both or neither")
    if args.intervene and episodes.value_url is None:
        raise EvaluationError("collect: --intervene: expected --value-url with it: the operator looks at the value")
    rule = TakeoverRule(args.intervene) if args.intervene else None
    first = 0 if args.demonstrations else ROLLOUT_SEED
    return _run(episodes, first, episodes.out, args.style, rule, console)


def evaluate_policy(args: Evaluate, console: Console | None = None) -> dict[str, Any]:
    """Run the episodes, write `<out>/evaluation.json` atomically, return its content."""
    episodes = args.episodes
    if episodes.policy_url is None:
        raise EvaluationError("evaluate: expected --policy-url, the policy service to evaluate; got none")
    record = episodes.out / "rollouts" if args.record == "all" else None
    results = _run(episodes, EVALUATION_SEED, record, "clean", None, console)
    robot = open_robot(episodes.robot)
    report = {
        "schema": SCHEMA, "robot": episodes.robot, "policy": served_by(episodes.policy_url, robot.spec),
        "realtime": episodes.realtime, "execute": episodes.execute, **statistics(results, robot.spec.control_hz),
    }  # fmt: skip
    robot.close()
    episodes.out.mkdir(parents=True, exist_ok=True)
    temporary = episodes.out / (NAME + ".tmp")
    temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, episodes.out / NAME)
    return report


def served_by(url: str, spec: Any) -> dict[str, Any]:
    """name, version and hash of the model behind `url`, with the conditioning it is served with."""
    from recap_client.policy import RemotePolicy

    policy = RemotePolicy(url, spec, robot="evaluation")
    details = policy.session.welcome.details
    policy.close()
    return {**policy.identity, **{key: details[key] for key in ("beta", "conditioning") if key in details}}


def statistics(results: Sequence[EpisodeResult], control_hz: float) -> dict[str, Any]:
    """Numbers of an evaluation: `overall`, `tasks` (by name) and `episodes` (rows), as in evaluation.json."""
    names = list(dict.fromkeys(result.task_name for result in results))
    latency = [seconds for result in results for seconds in result.act_latency_s]
    steps = sum(result.steps for result in results)
    missed = sum(result.missed_deadlines for result in results)
    return {
        "control_hz": control_hz,
        "overall": {
            **_rates(results, control_hz), "latency_s": percentiles(latency), "missed_deadlines": missed,
            "missed_deadline_rate": missed / steps if steps else 0.0, **_value_auc(results),
        },
        "tasks": {name: _rates([r for r in results if r.task_name == name], control_hz) for name in names},
        "episodes": [_row(result) for result in results],
    }  # fmt: skip


def percentiles(seconds: Sequence[float]) -> dict[str, float | int | None]:
    """n, p50, p90, p99 and max of latencies [s]; None where there are none."""
    if not seconds:
        return {"n": 0, "p50": None, "p90": None, "p99": None, "max": None}
    p50, p90, p99 = np.percentile(seconds, [50, 90, 99])
    return {"n": len(seconds), "p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(max(seconds))}


def summary_table(results: Sequence[EpisodeResult]) -> Table:
    """Success and length per task, for the console."""
    table = Table("task", "episodes", "success", "steps (success)", "operator steps", "deadlines missed")
    for name in dict.fromkeys(result.task_name for result in results):
        rows = [result for result in results if result.task_name == name]
        lengths = [row.steps for row in rows if row.success]
        table.add_row(
            name, str(len(rows)), f"{np.mean([bool(row.success) for row in rows]):.2f}",
            f"{np.mean(lengths):.1f}" if lengths else "-", str(sum(row.intervened for row in rows)),
            str(sum(row.missed_deadlines for row in rows)),
        )  # fmt: skip
    return table


def _rates(results: Sequence[EpisodeResult], control_hz: float) -> dict[str, Any]:
    success = [int(bool(result.success)) for result in results]
    steps = [result.steps for result in results]
    ratio, low, high = bootstrap_ratio(success, steps) if results else (0.0, 0.0, 0.0)
    minute = 60.0 * control_hz
    lengths = [n for n, ok in zip(steps, success, strict=True) if ok]
    return {
        "episodes": len(results), "successes": sum(success),
        "success_rate": sum(success) / len(success) if success else 0.0,
        "success_rate_95": list(wilson(sum(success), len(success))),
        "throughput_per_minute": ratio * minute, "throughput_per_minute_95": [low * minute, high * minute],
        "throughput_per_1000_steps": ratio * 1000, "throughput_per_1000_steps_95": [low * 1000, high * 1000],
        "mean_steps": float(np.mean(steps)) if steps else None,
        "mean_steps_success": float(np.mean(lengths)) if lengths else None,
    }  # fmt: skip


def _value_auc(results: Sequence[EpisodeResult]) -> dict[str, float | None]:
    """How well the value in the middle of an episode tells its end: AUC over episodes with values."""
    judged = [result for result in results if result.values]
    scores = [result.values[len(result.values) // 2][1] for result in judged]
    area = auc(scores, [bool(result.success) for result in judged])
    return {"value_auc": None if np.isnan(area) else area}


def _row(result: EpisodeResult) -> dict[str, Any]:
    row = asdict(result)
    row["act_p50_s"] = float(np.median(result.act_latency_s)) if result.act_latency_s else None
    row["act_latency_s"] = [round(seconds, 5) for seconds in result.act_latency_s]
    return row


def _run(episodes: Episodes, default_seed: int, record: Path | None, style: str, rule: TakeoverRule | None,
         console: Console | None) -> list[EpisodeResult]:  # fmt: skip
    first = default_seed if episodes.first_seed is None else episodes.first_seed
    jobs = jobs_for(episodes.tasks, episodes.episodes_per_task, first)
    settings = FleetSettings(
        episodes.robot, {}, episodes.policy_url, episodes.value_url, style, rule, record,
        LoopSettings(execute=episodes.execute, realtime=episodes.realtime),
    )  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=console is None) as bar:
        handle = bar.add_task("episodes", total=len(jobs), note="")
        return run_fleet(jobs, settings, workers=episodes.workers, on_result=_shower(bar, handle))


def _shower(bar: Progress, handle: Any) -> Callable[[EpisodeResult, bool], None]:
    done: list[bool] = []

    def show(result: EpisodeResult, resumed: bool) -> None:
        done.append(bool(result.success))
        note = f"success {np.mean(done):.2f}, {result.task_name} {result.steps} steps{' (kept)' if resumed else ''}"
        bar.update(handle, advance=1, note=note)

    return show
