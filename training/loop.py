"""The optimisation loop shared by policy and critic: schedule, clipping, weight average, metrics, exact resume.

A run keeps its state in `<out>.work/`: `state.safetensors` (weights, average, optimiser) and `metrics.jsonl`.
Everything random is seeded by (seed, step), so a resumed run continues on the batches and the noise it would have had.
A step is an optimiser step: its rows may be cut into micro-batches (`accumulate`) and over processes (`distributed`).
"""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from recap_model.policy.siglip import SiglipTower
from training.distributed import Replica, processes, replicate
from training.loader import Part
from training.optim import Average, make_optimizer, rate
from training.resume import Position, ResumeError, Run
from training.resume import forget_state as forget_state
from training.settings import FitSettings, Precision
from training.tracking import Tracker

# (step, generator) -> loss, or with `parts` (step, generator, part) -> the part's share of the loss
LossStep = Callable[..., Tensor]


def fit(
    module: nn.Module,
    loss_step: LossStep,
    settings: FitSettings,
    work: Path,
    *,
    what: str,
    identity: dict[str, Any],
    parts: bool = False,
) -> Average:
    """Train `module` in place for `settings.steps` optimiser steps, resuming from `work` when it holds a state of the
    same run.

    loss_step(step, generator) returns a scalar loss; with `parts` it is called as loss_step(step, generator, part) and
    returns the share of that `Part` of the step's rows, such that the shares of all parts add up to the loss of the
    step. identity: everything that must be the same for a resume (JSON).
    Returns the moving average of the weights. On Ctrl-C or SIGTERM the step is finished, the state saved and
    KeyboardInterrupt raised.
    """
    own = processes()
    if settings.accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1 micro-batch an optimiser step, got {settings.accumulate}")
    if not parts and settings.accumulate * own.count > 1:
        raise ValueError("fit: expected a loss that takes parts of a step (parts=True), got one of whole steps only")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    average = Average(module.named_parameters(), settings.optim.ema)
    identity = json.loads(json.dumps({**identity, "fit": asdict(settings)}, default=str))
    run = Run(module, make_optimizer(module, settings.optim), average, identity)
    position = run.restore(work)
    replica = replicate(module, loss_step if parts else lambda step, generator, _: loss_step(step, generator))
    _require_agreement(work, replica, module, position)
    tracker = Tracker(work, settings.tracker, position.step, name=what) if own.main else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = settings.steps < settings.log_every or not own.main
    with Progress(*columns, disable=hidden) as bar:
        try:
            _steps(run, replica, settings, work, position, tracker, bar, what)
        finally:
            if tracker is not None:
                tracker.close()
    return average


def _steps(
    run: Run,
    replica: Replica,
    settings: FitSettings,
    work: Path,
    position: Position,
    tracker: Tracker | None,
    bar: Progress,
    what: str,
) -> None:
    """Everything between start and end of a run."""
    task = bar.add_task(what, total=settings.steps, completed=position.step)
    main, alone, stop = tracker is not None, processes().count == 1, False
    with _held_signals() as came:
        try:
            for step in range(position.step, settings.steps):
                loss, norm, stop = _optimise(run, replica, step, settings, came)
                run.average.update(run.module, step)
                recent = (*position.recent, loss)
                bar.update(task, advance=1)
                if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
                    mean = sum(recent) / len(recent)
                    if tracker is not None:
                        lr = run.optimizer.param_groups[0]["lr"]
                        tracker.log(step + 1, {"loss": mean, "grad_norm": norm, "lr": lr})
                    bar.update(task, description=f"{what} loss {mean:.4f}")
                    recent = ()
                position = Position(step + 1, recent)
                if stop or (alone and came):
                    raise KeyboardInterrupt
                if main and (step + 1) % settings.save_every == 0 and step + 1 < settings.steps:
                    run.save(work, position)
        except KeyboardInterrupt:
            if main:
                run.save(work, position)
                said = f"{what}: interrupted after step {position.step}; run the same command again to resume"
                bar.console.print(said, soft_wrap=True)
            if stop:  # a launcher kills the others as soon as one has ended, so none ends before the state is written
                replica.total(torch.zeros(1, device=next(run.module.parameters()).device))
            raise


def _optimise(
    run: Run, replica: Replica, step: int, settings: FitSettings, came: list[int]
) -> tuple[float, float, bool]:
    """One optimiser step. Returns (loss, gradient norm, whether any process was told to stop)."""
    own, seed = processes(), settings.seed * 1_000_003 + step
    device = next(run.module.parameters()).device
    for group in run.optimizer.param_groups:
        group["lr"] = rate(step, settings.steps, settings.optim)
    run.optimizer.zero_grad()
    loss = torch.zeros((), device=device)
    for micro in range(settings.accumulate):
        part = Part(micro * own.count + own.rank, settings.accumulate * own.count)
        # dropout layers draw from the global generator: other masks for each part, the same ones on every run
        torch.manual_seed((seed + (part.index << 44)) % 2**63)
        # the loss's own draws are made for the whole step and cut, so every part starts from the same seed
        generator = torch.Generator().manual_seed(seed)
        last = micro + 1 == settings.accumulate
        with nullcontext() if last else replica.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                share = replica.loss(step, generator, part)
            share.backward()
        loss += share.detach() / own.count
    totals = replica.total(torch.stack([loss, torch.tensor(float(bool(came)), device=device)]))
    value, stops = totals.tolist()
    if not torch.isfinite(totals[0]):
        raise FloatingPointError(
            f"loss at step {step}: expected a finite number, got {value}; "
            "check the dataset for NaN (`recap returns` refuses them) or lower the learning rate"
        )
    norm = nn.utils.clip_grad_norm_(run.module.parameters(), settings.optim.clip)
    run.optimizer.step()
    return value, float(norm), stops > 0


@contextmanager
def _held_signals() -> Iterator[list[int]]:
    """Hold Ctrl-C and SIGTERM back, and say which came: a half-applied step could not be resumed, and processes that
    stop at different steps would wait for each other. Those that nobody acted on raise KeyboardInterrupt at the end."""
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda came, _: held.append(came)) for number in numbers]
    try:
        yield held
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


def _require_agreement(work: Path, replica: Replica, module: nn.Module, position: Position) -> None:
    """All processes must go on from the same step: they do not where nodes have a disk each."""
    own = processes()
    steps = torch.zeros(own.count, dtype=torch.int64, device=next(module.parameters()).device)
    steps[own.rank] = position.step
    found = sorted({int(step) for step in replica.total(steps).tolist()})
    if len(found) > 1:
        raise ResumeError(
            f"{work}: expected every process to resume from the same step, got steps {found}; put it on storage that "
            "all nodes share"
        )


def pick_device(name: str) -> torch.device:
    """ "auto" -> a GPU if torch sees one, else the CPU; anything else is torch's own name of a device.

    "auto" and "cuda" give each of several processes on a node its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    own = processes()
    return torch.device(f"cuda:{own.local}" if name == "cuda" and own.count > 1 else name)


def placer(module: nn.Module) -> Callable[[NDArray[Any]], Tensor]:
    """numpy -> torch, on the device where `module` is."""
    device = next(module.parameters()).device
    return lambda array: torch.from_numpy(array).to(device)


def autocast_vision(module: nn.Module, precision: Precision = "auto") -> Any:
    """bf16 for the image tower. "auto": the convolutional one everywhere (twice as fast on CPUs with bf16), SigLIP on
    CUDA."""
    device = next(module.parameters()).device.type
    auto = device == "cuda" or not isinstance(getattr(module, "vision", None), SiglipTower)
    return torch.autocast(device, torch.bfloat16, enabled=auto if precision == "auto" else precision == "bf16")
