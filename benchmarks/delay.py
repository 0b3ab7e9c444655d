"""A slow network between robot and policy: what each way of following one chunk with the next makes of it.

    python -m benchmarks.delay --models MODELS [--realtime]

MODELS: a repository that `recap export --rtc` wrote for the simulated arm. Every arm runs the same scenes with the same
noise. In lock step (the default) a reply is held back by control steps, so the result is the same on any machine; with
--realtime the arm keeps its control rate and a proxy on the loopback delays the bytes, which needs a quiet machine.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.network_proxy import NetworkProxy
from recap_client.chunks import STRATEGIES, Strategy
from recap_client.delay import Delay
from recap_client.episode import EpisodeResult, LoopSettings
from recap_client.fleet import FleetSettings, jobs_for, run_fleet

TASKS = ("button-press-topdown", "drawer-open", "door-open")


@dataclass(frozen=True)
class Arm:
    """One row of the table. delay None = none."""

    chunks: Strategy
    delay: Delay | None

    @property
    def name(self) -> str:
        return self.chunks + (" delayed" if self.delay else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run all arms, print a table and, as the last line, one JSON object."""
    args = _parser().parse_args(argv)
    delay = Delay(args.delay_ms / 1e3, args.jitter_ms / 1e3)
    arms = [Arm(chunks, None) for chunks in args.undelayed] + [Arm(chunks, delay) for chunks in args.chunks]
    results: dict[str, list[EpisodeResult]] = {}
    with _service(args.models) as port:
        for arm in arms:
            print(f"{arm.name}: {len(args.tasks)} tasks of {args.episodes} episodes", file=sys.stderr, flush=True)
            results[arm.name] = _run(arm, port, args)
    rows = [_row(arm, results[arm.name], args.tasks) for arm in arms]
    pairs = _pairs(results)
    print(_table(rows, pairs))
    how = "real time" if args.realtime else "lock step"
    setting = {"delay_ms": args.delay_ms, "jitter_ms": args.jitter_ms, "execute": args.execute, "seed": args.seed}
    print(json.dumps({"mode": how, **setting, "horizon": args.horizon, "rows": rows, "pairs": pairs}))
    return 0


def _run(arm: Arm, port: int, args: argparse.Namespace) -> list[EpisodeResult]:
    late = None if args.realtime else arm.delay
    loop = LoopSettings(args.execute, args.realtime, chunks=arm.chunks, horizon=args.horizon, delay=late)
    with contextlib.ExitStack() as stack:
        if args.realtime:
            slow = arm.delay or Delay(0.0)
            proxy = NetworkProxy(port, delay_s=slow.delay_s, jitter_s=slow.jitter_s, seed=args.seed, direction="down")
            port = stack.enter_context(proxy).port
        settings = FleetSettings(policy_url=f"ws://127.0.0.1:{port}/act", loop=loop)
        return run_fleet(jobs_for(args.tasks, args.episodes, args.seed), settings)


@contextlib.contextmanager
def _service(models: Path) -> Iterator[int]:
    from services.common.server import running
    from services.common.settings import PolicySettings
    from services.policy.app import create_app
    from services.policy.pipeline import load_policy_engine

    app = create_app(load_policy_engine(models, 1.0, "onnxruntime"), PolicySettings())
    with running(app, app.state.limits) as bound:
        yield bound.port


def _row(arm: Arm, results: Sequence[EpisodeResult], tasks: Sequence[str]) -> dict[str, Any]:
    won = np.array([bool(result.success) for result in results])
    delays = [delay for result in results for delay in result.delays]
    seams = [seam for result in results for seam in result.seams] or [float("nan")]
    return {
        "arm": arm.name,
        "chunks": arm.chunks,
        "delayed": arm.delay is not None,
        "episodes": len(results),
        "success": round(float(won.mean()), 4),
        "tasks": {
            task: round(float(won[np.array([r.task_name == task for r in results])].mean()), 3) for task in tasks
        },
        "steps": round(float(np.mean([result.steps for result in results])), 2),
        "starved": round(float(np.mean([result.starved for result in results])), 2),
        "requests": round(float(np.mean([len(result.act_latency_s) for result in results])), 2),
        "delay_steps": round(float(np.mean(delays)), 2),
        "seam_mean": round(float(np.mean(seams)), 4),
        "seam_p95": round(float(np.quantile(seams, 0.95)), 4),
    }


def _pairs(results: dict[str, list[EpisodeResult]]) -> list[dict[str, Any]]:
    """Delayed arms against switching without and with the delay, on the same scenes: difference of the success rates
    with a 95 % interval (bootstrap of scenes)."""
    won = {name: np.array([bool(result.success) for result in runs], float) for name, runs in results.items()}
    random = np.random.default_rng(0)
    count = len(next(iter(won.values())))
    draws = random.integers(0, count, (4000, count))
    pairs = []
    for one in won:
        for other in ("switch", "switch delayed"):
            if other not in won or one == other or not one.endswith("delayed"):
                continue
            difference = won[one] - won[other]
            low, high = np.quantile(difference[draws].mean(axis=1), (0.025, 0.975))
            pairs.append({"arm": one, "against": other, "difference": round(float(difference.mean()), 4),
                          "low": round(float(low), 4), "high": round(float(high), 4)})  # fmt: skip
    return pairs


def _table(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> str:
    tasks = list(rows[0]["tasks"])
    lines = [f"| arm | success | {' | '.join(tasks)} | steps | starved | delay, steps | seam mean | seam p95 |",
             "|---|" + "---|" * (len(tasks) + 6)]  # fmt: skip
    for row in rows:
        of_tasks = " | ".join(f"{100 * row['tasks'][task]:.0f} %" for task in tasks)
        lines.append(f"| {row['arm']} | {100 * row['success']:.1f} % | {of_tasks} | {row['steps']} | "
                     f"{row['starved']} | {row['delay_steps']} | {row['seam_mean']} | {row['seam_p95']} |")  # fmt: skip
    lines += ["", "| arm | against | difference of success, points (95 %) |", "|---|---|---|"]
    for pair in pairs:
        interval = f"{100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}"
        lines.append(f"| {pair['arm']} | {pair['against']} | {100 * pair['difference']:+.1f} ({interval}) |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delay", description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="model repository, exported with --rtc")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--episodes", type=int, default=30, help="per task and arm")
    parser.add_argument("--seed", type=int, default=70_000, help="of the first scene")
    parser.add_argument(
        "--delay-ms", type=float, default=150.0, help="from observation to reply, beside the model's time"
    )
    parser.add_argument("--jitter-ms", type=float, default=50.0, help="of the delay, plus or minus, uniform")
    parser.add_argument("--chunks", nargs="*", choices=STRATEGIES, default=list(STRATEGIES), help="with the delay")
    parser.add_argument("--undelayed", nargs="*", choices=STRATEGIES, default=["switch", "rtc"], help="without it")
    parser.add_argument("--execute", type=int, default=4, help="actions of a chunk before asking again")
    parser.add_argument("--horizon", type=int, help="rtc: rows of the old chunk to hold on to (default: the delay)")
    parser.add_argument("--realtime", action="store_true", help="keep the control rate, delay by a proxy")
    return parser


if __name__ == "__main__":
    sys.exit(main())
