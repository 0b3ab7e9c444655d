"""`recap probe`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


@dataclass(frozen=True)
class Probe:
    """Does the policy do what its prompt says? The same scenes under every prompt, without a service.

    A policy that is as good when told `negative` has not learned what the labels say, and cannot be steered by them.
    """

    checkpoint: tyro.conf.Positional[Path]
    out: Path
    """Folder to write into: one evaluation.json a variant."""
    prompts: tuple[Literal["positive", "negative", "none"], ...] = ("positive", "negative", "none")
    betas: tuple[float, ...] = (1.0,)
    """Guidance strengths of the positive prompt (1 = none)."""
    tasks: tuple[str, ...] = ("button-press-topdown", "drawer-open", "door-open")
    episodes_per_task: int = 20
    first_seed: int = 90_000
    """Scenes; the default ones are for development, `recap evaluate` starts at 100000."""
    robot: str = "metaworld"
    """Name, or package.module:Class."""
    execute: int = 4
    """Actions of a chunk before asking again."""
    noise_scale: float = 1.0
    """How much of its noise the flow begins at, as of `recap serve`: 1 as in training, 0 for none."""
    workers: int = 2
    """Robots at once, one process each."""


def main(argv: list[str]) -> int:
    """Run every variant, print a table against the positive prompt."""
    args = tyro.cli(Probe, args=argv, prog="recap probe", description=Probe.__doc__)
    from training.probe import Variant, compare, probe

    variants = [Variant("positive", beta) for beta in args.betas if "positive" in args.prompts]
    variants += [Variant(prompt) for prompt in args.prompts if prompt != "positive"]
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        total = len(args.tasks) * args.episodes_per_task * len(variants)
        task, done = bar.add_task("episodes", total=total), []

        def show(variant: Any, result: Any) -> None:
            done.append(bool(result.success))
            bar.update(task, advance=1, description=f"{variant.name}, success {np.mean(done):.2f}")

        reports = probe(
            args.checkpoint,
            variants,
            args.out,
            tasks=args.tasks,
            episodes_per_task=args.episodes_per_task,
            first_seed=args.first_seed,
            robot=args.robot,
            execute=args.execute,
            noise_scale=args.noise_scale,
            workers=args.workers,
            on_result=show,
        )
    first = next(iter(reports))
    table = Table("prompt", "success", "per minute", f"throughput over {first}")
    lines = {}
    for name, report in reports.items():
        overall = report["overall"]
        ratio = compare(report, reports[first])
        low, high = overall["success_rate_95"]
        table.add_row(
            name,
            f"{overall['success_rate']:.3f} [{low:.3f}, {high:.3f}]",
            f"{overall['throughput_per_minute']:.2f}",
            "1" if name == first else f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]",
        )
        lines[name] = {"success_rate": overall["success_rate"], "per_minute": overall["throughput_per_minute"],
                       "ratio": ratio[0]}  # fmt: skip
    console.print(table)
    print(json.dumps(lines))
    return 0
