"""`recap values`."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Values:
    """Write a critic's value of every frame. Run the same command again after an interruption: it goes on.

    Several processes share the work: by --shard, or under torchrun each takes the shard of its rank.
    """

    critic: Path
    """Checkpoint of `recap train critic`."""
    dataset: Path
    out: Path
    """Folder for the values, read by `recap label`; published when the last part is there."""
    shard: str | None = None
    """i/n, i from 0: compute part i of n. The processes need the same --out, on storage that they share."""
    batch_size: int = 256
    """Frames of a forward pass."""
    unseen: bool = False
    """The critic has trained on none of these episodes. Without it all of them count as seen, except what it held out
    of this very dataset, and the label audit warns."""
    device: str = "auto"
    """auto takes a GPU if torch sees one; else cpu, cuda, cuda:1, ..."""


def values(argv: list[str]) -> int:
    """Critic + dataset -> values."""
    args = tyro.cli(Values, args=argv, prog="recap values", description=Values.__doc__)
    from training.distributed import processes
    from training.values import Shard, compute_values, parse_shard

    own = processes()
    shard = Shard(own.rank, own.count) if args.shard is None else parse_shard(args.shard)
    result = compute_values(
        args.critic,
        args.dataset,
        args.out,
        shard=shard,
        batch_size=args.batch_size,
        unseen=args.unseen,
        device=args.device,
        show=own.main,
    )
    done = f"{args.out}: shard {shard.index}/{shard.count} is done"
    if result.manifest is None:
        print(f"{done}; {result.missing} of {result.segments} parts are missing, which other shards compute")
    else:
        print(f"{done}, and so are all: values {result.manifest.hash[:12]}")
    return 0
