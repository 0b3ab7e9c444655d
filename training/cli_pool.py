"""`recap pool`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from training.experiment.pool import Comparison, Policy, Pool

_CONTROLS = ("imitation", "successes", "filtered", "recap-negative", "recap-none")


@dataclass(frozen=True)
class PoolRuns:
    """Several runs of `recap loop` as one body of evidence: tables in Markdown, and JSON on the last line.

    Every run needs its own `--seed`: other data, other training noise, other scenes.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of `recap loop`."""
    beta: float = 1.0
    """Guidance that the comparisons are made for. Choose it on other scenes than these (`recap probe --betas`)."""
    out: Path | None = None
    """Also write the tables to this file."""


def main(argv: list[str]) -> int:
    """Print tables of all policies and of the comparisons."""
    args = tyro.cli(PoolRuns, args=argv, prog="recap pool", description=PoolRuns.__doc__)
    from training.experiment.pool import pool

    found = pool(args.runs)
    compared = list(_comparisons(found, args.beta))
    text = "\n".join([*_policies(found), "", *_table(compared)])
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    print(json.dumps({"preset": found.preset, "runs": found.runs, "comparisons": [_json(*row) for row in compared]}))
    return 0


def _policies(found: "Pool") -> Iterator[str]:
    from training.experiment.pool import success_interval

    episodes = found.policies[0].success.size
    yield f"{found.runs} runs, {len(found.tasks)} tasks, {episodes} episodes a policy."
    yield ""
    yield "| policy | success | " + " | ".join(found.tasks) + " | steps (success) | successes per minute |"
    yield "|---|---|" + "---|" * (len(found.tasks) + 2)
    for policy in found.policies:
        rate, low, high = success_interval(policy)
        tasks = " | ".join(f"{value:.3f}" for value in policy.success.mean((0, 2)))
        steps = (policy.steps * policy.success).sum() / max(policy.success.sum(), 1)
        pace = policy.throughput * 60 * found.control_hz
        yield f"| {policy.title} | {rate:.3f} [{low:.3f}, {high:.3f}] | {tasks} | {steps:.1f} | {pace:.1f} |"


def _comparisons(found: "Pool", beta: float) -> "Iterator[tuple[Policy, Policy, Comparison]]":
    from training.experiment.pool import compare

    iterations = sorted({policy.iteration for policy in found.policies if policy.name == "recap"})
    for k in iterations:
        for strength in dict.fromkeys((beta, 1.0)):
            ours = found.find("recap", k, strength)
            for policy in found.policies:
                if policy.name in _CONTROLS and policy.iteration == k:
                    yield ours, policy, compare(ours, policy)
    for k in iterations[1:]:
        ours, before = found.find("recap", k, beta), found.find("recap", k - 1, beta)
        yield ours, before, compare(ours, before)


def _table(compared: "list[tuple[Policy, Policy, Comparison]]") -> Iterator[str]:
    yield "| policy | against | throughput ratio, 95 % over episodes | over runs | each run | success |"
    yield "|---|---|---|---|---|---|"
    for ours, theirs, result in compared:
        value, low, high = result.ratio
        each = ", ".join(f"{ratio:.2f}" for ratio in result.per_run)
        gain = f"{100 * result.gain[0]:+.1f} points [{100 * result.gain[1]:+.1f}, {100 * result.gain[2]:+.1f}]"
        runs = f"[{result.over_runs[1]:.2f}, {result.over_runs[2]:.2f}]"
        yield f"| {ours.title} | {theirs.title} | {value:.2f} [{low:.2f}, {high:.2f}] | {runs} | {each} | {gain} |"


def _json(ours: "Policy", theirs: "Policy", result: "Comparison") -> dict[str, Any]:
    return {
        "policy": ours.name, "iteration": ours.iteration, "beta": ours.beta, "against": theirs.name,
        "against_iteration": theirs.iteration, "ratio": result.ratio, "over_runs": result.over_runs[1:],
        "per_run": result.per_run, "success_gain": result.gain,
    }  # fmt: skip
