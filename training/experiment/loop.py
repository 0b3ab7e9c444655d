"""Run a plan: skip what is done, run what is not, and stop anywhere without losing either."""

import fcntl
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from training.experiment import children
from training.experiment.config import LoopConfig, defaults
from training.experiment.receipts import Receipts
from training.experiment.stages import Stage, describe, plan


class LoopError(ValueError):
    """A run cannot go on in this folder."""


class Reporter(Protocol):
    """Told what happens; the terminal, a test."""

    def skipped(self, stage: Stage) -> None: ...
    def started(self, stage: Stage, log: Path) -> None: ...
    def tick(self) -> None: ...
    def finished(self, stage: Stage, seconds: float) -> None: ...


@dataclass(frozen=True)
class Silent:
    """Reports nothing."""

    def skipped(self, stage: Stage) -> None: ...
    def started(self, stage: Stage, log: Path) -> None: ...
    def tick(self) -> None: ...
    def finished(self, stage: Stage, seconds: float) -> None: ...


def run_loop(config: LoopConfig, run: Path, iterations: int, reporter: Reporter | None = None) -> None:
    """Carry out all stages of `config` in the folder `run`; finished ones are skipped. Raises StageError when a stage
    fails and LoopError when the folder holds another run or is in use."""
    run.mkdir(parents=True, exist_ok=True)
    with locked(run), terminable():
        _write_description(run, config, iterations)
        run_stages(plan(config, iterations), run, reporter or Silent())


def run_stages(
    stages: Sequence[Stage], run: Path, reporter: Reporter, *, program: Sequence[str] = children.PROGRAM
) -> None:
    """Run stages in order in the folder `run`, each with its log under `run`/logs."""
    receipts = Receipts(run)
    for stage in stages:
        if receipts.state(stage) == "done":
            reporter.skipped(stage)
            continue
        log = run / "logs" / f"{stage.name.replace(' ', '-')}.log"
        reporter.started(stage, log)
        receipts.start(stage)
        begin = time.monotonic()
        _run_stage(stage, run, log, program, reporter.tick)
        seconds = time.monotonic() - begin
        receipts.finish(stage, seconds)
        reporter.finished(stage, seconds)


def _run_stage(stage: Stage, run: Path, log: Path, program: Sequence[str], tick: Callable[[], None]) -> None:
    if stage.serve is None:
        children.run(stage.command, run, log, program=program, tick=tick)
        return
    with children.services(stage.serve, run, log.with_suffix(".services.log"), program=program) as urls:
        command = [part.format(**urls) for part in stage.command]
        children.run(command, run, log, program=program, tick=tick)


def _write_description(run: Path, config: LoopConfig, iterations: int) -> None:
    """loop.json: what this run is. Another configuration in the same folder is refused: its stages would be redone."""
    path = run / "loop.json"
    wanted: dict[str, Any] = json.loads(json.dumps(describe(config, iterations)))
    if path.is_file():
        # a setting that did not exist when the run began had what is its default now
        found = defaults() | json.loads(path.read_text()).get("config", {})
        changed = sorted(key for key, value in wanted["config"].items() if found.get(key) != value)
        if changed:
            raise LoopError(
                f"{run}: holds a run with another configuration (differs in {', '.join(changed)}): expected preset "
                f"{found.get('name')!r} as it was, got {config.name!r}; choose another --out"
            )
    path.write_text(json.dumps(wanted, indent=1) + "\n")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """One loop in a folder at a time; the lock ends with the process, however it ends."""
    with (run / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LoopError(f"{run}: expected a folder that no other loop is working in, got one in use") from error
        yield


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM stops the loop as Ctrl-C does: children first."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
