"""Several processes as one run, under `torchrun` or `accelerate launch`. A single process imports nothing of it.

Who is who comes from the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK). Every process holds the same weights
and takes its share of each step's rows; gradients are summed, so the result is that of one process on all rows.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_model.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

PATIENCE_S = 2 * 3600  # one process may decode a dataset or publish a large checkpoint while the others wait


class DistributedError(ValueError):
    """The launcher's environment asks for something that this run cannot do."""


@dataclass(frozen=True)
class Processes:
    """This process is number `rank` of `count`; `local` of those on its node. Number 0 writes and shows progress."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        return self.rank == 0


def processes() -> Processes:
    """What the launcher says; (0, 1) without one. Raises DistributedError on numbers that make no sense."""
    names = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
    texts = {name: os.environ.get(name, "") or str(default) for name, default in names.items()}
    wrong = [f"{name}={text!r}" for name, text in texts.items() if not text.isdecimal()]
    if wrong:
        raise DistributedError(f"environment: expected whole numbers from the launcher, got {', '.join(wrong)}")
    count, rank, local = (int(text) for text in texts.values())
    if count <= 1:
        return Processes()
    if rank >= count:
        raise DistributedError(f"environment: expected RANK below WORLD_SIZE={count}, got RANK={rank}")
    return Processes(rank, count, local)


@cache
def accelerator(cpu: bool) -> Any:
    """Hugging Face's Accelerator, which joins the process group at the first call. cpu: although there are GPUs."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    for name, what in (("FSDP", "fully sharded"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes"):
            raise DistributedError(
                f"accelerate: expected plain data-parallel training, got a {what} configuration; launch with "
                "`accelerate launch --multi_gpu` or `torchrun`"
            )
    from datetime import timedelta

    # Some parameters get no gradient (the language head, in policy training), and buffers are constants.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=PATIENCE_S))
    made = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[ddp, patience])
    if made.num_processes != processes().count:
        raise DistributedError(
            f"accelerate: expected {processes().count} processes (WORLD_SIZE), got {made.num_processes} "
            f"({made.distributed_type}); with GPUs, start one process a GPU, or pass --device cpu"
        )
    import atexit

    atexit.register(made.end_training)
    return made


@dataclass(frozen=True)
class Replica:
    """A module's copy in this process: `loss` evaluates a micro-batch's share, `total` sums numbers over processes."""

    loss: Callable[..., "torch.Tensor"]
    total: Callable[["torch.Tensor"], "torch.Tensor"]
    no_sync: Callable[[], AbstractContextManager[Any]]


def replicate(module: "torch.nn.Module", loss_step: Callable[..., "torch.Tensor"]) -> Replica:
    """`module` with its gradients summed over processes at each backward outside `no_sync`."""
    own = processes()
    if own.count == 1:
        return Replica(loss_step, lambda numbers: numbers, nullcontext)
    import torch

    device = next(module.parameters()).device

    class Step(torch.nn.Module):
        """The loss as a module's forward: data-parallel wrappers hook into nothing else."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *arguments: Any) -> torch.Tensor:
            # the wrapper averages gradients over processes, and shares are to be summed
            return loss_step(*arguments) * own.count

    joined = accelerator(device.type == "cpu")
    model = joined.prepare_model(Step(), device_placement=False)

    def total(numbers: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(numbers)
        return numbers

    return Replica(lambda *a: model(*a), total, lambda: joined.no_sync(model))


def gather_rows(values: "NDArray[np.float64]", device: "torch.device") -> "NDArray[np.float64]":
    """Sum over processes of arrays in which each has filled in its own rows and left 0 elsewhere."""
    if processes().count == 1:
        return values
    import torch

    accelerator(device.type == "cpu")
    numbers = torch.from_numpy(values).to(device)
    torch.distributed.all_reduce(numbers)
    return numbers.cpu().numpy()


def once(out: Path, write: Callable[[], Manifest], device: "torch.device") -> Manifest:
    """The manifest that `write` returns after publishing `out`; with several processes number 0 writes, others wait."""
    own = processes()
    if own.count == 1:
        return write()
    joined = accelerator(device.type == "cpu")
    written = write() if own.main else None
    joined.wait_for_everyone()
    if written is not None:
        return written
    # storage that the nodes do not share shows nothing here, and the checkpoint is where process 0 wrote it
    return read_manifest(out) if out.exists() else Manifest("elsewhere", "")
