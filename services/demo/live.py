"""The terminal while the demo runs: task, success so far, value, latency, dashboard. Plain lines without a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from recap_client.runtime import EpisodeResult
from services.demo.drive import Job

_WIDTH = 34
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass
class Progress:
    """A view on a running demo; `update` is cheap and may be called as often as one likes."""

    console: Console
    jobs: Sequence[Job]
    period_ms: float
    dashboard: str
    done: list[EpisodeResult] = field(default_factory=list)
    _live: Live | None = None
    _newest: Mapping[str, Any] = field(default_factory=dict)
    _curve: Sequence[tuple[float, float]] = ()

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._live = Live(self._render(), console=self.console, refresh_per_second=8, transient=True)
            self._live.__enter__()
        else:
            self.console.print(f"dashboard: {self.dashboard}", soft_wrap=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def update(self, newest: Mapping[str, Any], curve: Sequence[tuple[float, float]]) -> None:
        """Show the critic's newest event and the values of the episode in hand."""
        self._newest, self._curve = newest, curve
        if self._live is not None:
            self._live.update(self._render())

    def finished(self, result: EpisodeResult) -> None:
        """Note the end of an episode."""
        job = self.jobs[len(self.done)]
        self.done.append(result)
        if self._live is None:
            verdict = "success" if result.success else result.reason
            kind = "fault drill" if job.drill else "episode"
            self.console.print(
                f"{len(self.done):3d}/{len(self.jobs)} {kind:11} {result.task:28} {verdict:8} {result.steps:3d} steps, "
                f"{result.missed_deadlines} late",
                soft_wrap=True, highlight=False,
            )  # fmt: skip

    def _render(self) -> Panel:
        now = self.jobs[min(len(self.done), len(self.jobs) - 1)]
        value = self._newest.get("value")
        latency = self._newest.get("latency_ms")
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", justify="right")
        grid.add_column()
        grid.add_row(
            "task",
            f"[bold]{self._newest.get('task') or now.task}[/]" + ("  [yellow]fault drill[/]" if now.drill else ""),
        )
        grid.add_row("episode", f"{min(len(self.done) + 1, len(self.jobs))} of {len(self.jobs)}")
        grid.add_row("value", _bar(value, bool(self._newest.get("alarm"))))
        grid.add_row("so far", Text(sparkline([v for _, v in self._curve]), style="green"))
        grid.add_row("latency", "-" if latency is None else f"{latency:.1f} ms of {self.period_ms:.0f} ms")
        grid.add_row("dashboard", f"[link={self.dashboard}]{self.dashboard}[/]")
        return Panel(Group(grid, Text(), self._scores()), title="recap demo", title_align="left", width=78)

    def _scores(self) -> Table:
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for name in ("task", "success", "steps", "late"):
            table.add_column(name, justify="left" if name == "task" else "right")
        pairs = list(zip(self.done, self.jobs, strict=False))
        for task in dict.fromkeys(job.task for job in self.jobs if not job.drill):
            ended = [result for result, job in pairs if job.task == task and not job.drill]
            good = [result for result in ended if result.success]
            steps = f"{np.mean([result.steps for result in good]):.0f}" if good else "-"
            late = str(sum(result.missed_deadlines for result in ended))
            table.add_row(task, f"{len(good)}/{len(ended)}", steps, late)
        drills = [result for result, job in pairs if job.drill]
        if drills:
            table.add_row("fault drills", f"{sum(bool(item.success) for item in drills)}/{len(drills)}", "", "")
        return table


def _bar(value: float | None, alarm: bool) -> Text:
    if value is None:
        return Text("waiting for the critic", style="dim")
    filled = round((1 + min(0.0, max(-1.0, value))) * _WIDTH)
    bar = Text("█" * filled, style="red" if alarm else "green")
    bar.append("░" * (_WIDTH - filled), style="dim")
    return bar.append(f" {value:+.2f}" + ("  alarm" if alarm else ""))


def sparkline(values: Sequence[float]) -> str:
    """Values in [-1, 0] as a line of blocks."""
    levels = (min(len(_BLOCKS) - 1, max(0, int((1 + value) * len(_BLOCKS)))) for value in values[-_WIDTH:])
    return "".join(_BLOCKS[level] for level in levels)
