"""`recap loop`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from training.experiment.stages import Stage


@dataclass(frozen=True)
class Loop:
    """The whole circle in simulation: collect, ingest, returns, critic, labels, policy, export, evaluate, report.

    Every stage is a command of its own with its log under OUT/logs. Run the same command again after an interruption:
    finished stages are recognised and skipped.
    """

    out: Path
    """Folder of the run; the report will be OUT/report.html."""
    preset: Literal["debug", "tiny", "study"] = "tiny"
    """debug: every stage at its smallest, minutes. tiny: the experiment, about an hour on two cores. study: one run of
    the evidence in docs/results.md, with every control and the prompts' probe."""
    iterations: int = 1
    """RECAP iterations after the first imitation policy."""
    seed: int = 0
    """Number of the run: other data, training noise and evaluation scenes for each."""
    plan: bool = False
    """Only print the commands that would run."""


def loop(argv: list[str]) -> int:
    """Run or resume a loop."""
    args = tyro.cli(Loop, args=argv, prog="recap loop", description=Loop.__doc__)
    from importlib import import_module

    from training.experiment.config import with_seed
    from training.experiment.loop import run_loop
    from training.experiment.stages import plan

    config = with_seed(import_module(f"training.presets.loop_{args.preset}").loop(), args.seed)
    stages = plan(config, args.iterations)
    console = Console(highlight=False)
    if args.plan:
        for stage in stages:
            if stage.serve:
                console.print(f"# with `recap serve {'all' if stage.serve.critic else 'policy'} --models "
                              f"{stage.serve.models} --beta {stage.serve.beta:g}`", soft_wrap=True)  # fmt: skip
            console.print(f"recap {' '.join(stage.command)}", soft_wrap=True, markup=False)
        return 0
    with Terminal(console, len(stages)) as terminal:
        run_loop(config, args.out, args.iterations, terminal)
    console.print(f"{args.out / 'report.html'}")
    return 0


class Terminal:
    """Progress over the plan: one line a finished stage, a bar, and the last line of the running stage's log."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._log, self._begin = console, Path(), time.monotonic()
        text = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(), text)
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task("", total=total)
        self._name = ""

    def __enter__(self) -> "Terminal":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def skipped(self, stage: "Stage") -> None:
        self._console.print(f"[dim]already done[/]  {stage.name}")
        self._progress.advance(self._task)

    def started(self, stage: "Stage", log: Path) -> None:
        self._name, self._log = stage.name, log
        self.tick()

    def tick(self) -> None:
        self._progress.update(self._task, description=f"{self._name}  {_last_line(self._log)}")

    def finished(self, stage: "Stage", seconds: float) -> None:
        self._console.print(f"[green]{seconds:8.1f} s[/]    {stage.name}")
        self._progress.advance(self._task)


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - 400))
            lines = stream.read().decode(errors="replace").replace("\r", "\n").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip()[:80] if lines else ""
