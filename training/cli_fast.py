"""`recap fit-fast`."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class FitFast:
    """Fit a FAST tokenizer on a dataset: chunks of actions become a few tokens, which `recap train policy --fast` lets
    the backbone learn. Actions are normalised by the 1 % and 99 % quantiles of the data (or of --init)."""

    dataset: tyro.conf.Positional[Path]
    """LeRobot dataset."""
    out: Path
    """Folder to publish."""
    chunk: int | None = None
    """Actions of a chunk: that of the policy to train. Default: of --init."""
    init: Path | None = None
    """Policy checkpoint that training will start from; gives its statistics and its chunk length."""
    scale: float = 10.0
    """Steps per unit that coefficients are rounded to: more is finer, and longer."""
    vocabulary: int = 1024
    """Tokens to learn."""
    chunks: int = 10_000
    """Most chunks to learn the tokens from, drawn at random; the range of coefficients is that of all."""
    seed: int = 0


def main(argv: list[str]) -> int:
    """Fit, say how well it does, publish."""
    args = tyro.cli(FitFast, args=argv, prog="recap fit-fast", description=FitFast.__doc__)
    from training.fit_fast import fit_dataset

    manifest = fit_dataset(
        args.dataset,
        args.out,
        chunk=args.chunk,
        init=args.init,
        scale=args.scale,
        vocabulary=args.vocabulary,
        most=args.chunks,
        seed=args.seed,
    )
    print(f"{args.out}: {manifest.kind} {manifest.hash[:12]}")
    for key, value in manifest.metrics.items():
        print(f"  {key}: {value:.4g}")
    print(f"train with it: recap train policy --fast {args.out}")
    return 0
