"""The optimisation loop shared by policy and critic: schedule, clipping, weight average, metrics, exact resume.

A run keeps its state in `<out>.work/`: `state.safetensors` (weights, average, optimiser), `step.json`, `metrics.jsonl`.
Everything random is seeded by (seed, step), so a resumed run continues on the batches and the noise it would have had.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recap_model.policy.siglip import SiglipTower
from training.optim import Average, make_optimizer, rate
from training.settings import FitSettings
from training.tracking import Tracker

LossStep = Callable[[int, torch.Generator], Tensor]


class ResumeError(ValueError):
    """A work folder was written by a run with other settings."""


def fit(
    module: nn.Module, loss_step: LossStep, settings: FitSettings, work: Path, *, what: str, identity: dict[str, Any]
) -> Average:
    """Train `module` in place for `settings.steps` steps, resuming from `work` when it holds a state of the same run.

    loss_step(step, generator) returns a scalar loss. identity: everything that must be the same for a resume (JSON).
    Returns the moving average of the weights. On Ctrl-C the state is saved and KeyboardInterrupt goes on.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    optimizer = make_optimizer(module, settings.optim)
    average = Average(module.named_parameters(), settings.optim.ema)
    identity = json.loads(json.dumps({**identity, "fit": asdict(settings)}, default=str))
    start = _restore(work, module, optimizer, average, identity)
    tracker = Tracker(work, settings.tracker, start, name=what)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done, recent = start, []
    with Progress(*columns, disable=settings.steps < settings.log_every) as bar:
        task = bar.add_task(what, total=settings.steps, completed=start)
        try:
            for step in range(start, settings.steps):
                with _whole():
                    loss, norm = _optimise(module, optimizer, loss_step, step, settings)
                    average.update(module, step)
                    done = step + 1
                recent.append(loss)
                bar.update(task, advance=1)
                if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
                    mean = sum(recent) / len(recent)
                    tracker.log(step + 1, {"loss": mean, "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]})
                    bar.update(task, description=f"{what} loss {mean:.4f}")
                    recent = []
                if (step + 1) % settings.save_every == 0 and step + 1 < settings.steps:
                    _save(work, module, optimizer, average, step + 1, identity)
        except KeyboardInterrupt:
            _save(work, module, optimizer, average, done, identity)
            bar.console.print(f"{what}: interrupted after step {done}; run the same command again to resume")
            raise
        finally:
            tracker.close()
    return average


@contextmanager
def _whole() -> Iterator[None]:
    """Hold Ctrl-C back until the block is over: a half-applied step could not be resumed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


def _optimise(
    module: nn.Module, optimizer: torch.optim.Optimizer, loss_step: LossStep, step: int, settings: FitSettings
) -> tuple[float, float]:
    """One optimiser step. Returns (loss, gradient norm)."""
    torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout layers draw from the global generator
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    for group in optimizer.param_groups:
        group["lr"] = rate(step, settings.steps, settings.optim)
    loss = loss_step(step, generator)
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"loss at step {step}: expected a finite number, got {loss.item()}; "
            "check the dataset for NaN (`recap returns` refuses them) or lower the learning rate"
        )
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(module.parameters(), settings.optim.clip)
    optimizer.step()
    return loss.item(), float(norm)


def _save(
    work: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    step: int,
    identity: dict[str, Any],
) -> None:
    """Write the state beside the old one, then replace it: a crash leaves the one or the other."""
    work.mkdir(parents=True, exist_ok=True)
    tensors = {f"weight.{n}": p.detach() for n, p in module.named_parameters()}
    tensors |= {f"average.{n}": p for n, p in average.shadow.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        work / "state.tmp",
        metadata={"step": str(step), "identity": json.dumps(identity, sort_keys=True)},
    )
    os.replace(work / "state.tmp", work / "state.safetensors")


def _restore(
    work: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average, identity: dict[str, Any]
) -> int:
    """Load the state in `work` if there is one; returns the step to continue from."""
    path = work / "state.safetensors"
    if not path.is_file():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as stream:
        meta = stream.metadata()
    before = json.loads(meta["identity"])
    if before != identity:
        keys = sorted(k for k in {*before, *identity} if before.get(k) != identity.get(k))
        raise ResumeError(
            f"{work}: holds an unfinished run with other {', '.join(keys)}: expected "
            f"{[identity.get(k) for k in keys]}, got {[before.get(k) for k in keys]}; "
            "finish it with the old settings or remove the folder"
        )
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            average.shadow[name].copy_(tensors[f"average.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(meta["step"])


def forget_state(work: Path) -> None:
    """Remove the resumable states below `work` once their run is published; metrics stay."""
    for path in work.rglob("state.safetensors"):
        path.unlink()


def pick_device(name: str) -> torch.device:
    """ "auto" -> a GPU if torch sees one, else the CPU; anything else is torch's own name of a device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def placer(module: nn.Module) -> Callable[[NDArray[Any]], Tensor]:
    """numpy -> torch, on the device where `module` is."""
    device = next(module.parameters()).device
    return lambda array: torch.from_numpy(array).to(device)


def autocast_vision(module: nn.Module) -> Any:
    """bf16 for the image tower: the convolutional one everywhere (twice as fast on CPUs with bf16), SigLIP on CUDA."""
    device = next(module.parameters()).device.type
    enabled = device == "cuda" or not isinstance(getattr(module, "vision", None), SiglipTower)
    return torch.autocast(device, torch.bfloat16, enabled=enabled)
