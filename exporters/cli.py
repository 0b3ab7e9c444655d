"""`recap export`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class ExportArgs:
    """Checkpoints to a model repository that `recap serve` and Triton read."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Policy and critic checkpoint folders."""
    out: Path
    """Model repository. A critic in it is kept when a policy is exported, and the other way round."""
    target: Literal["onnx"] = "onnx"
    guided: bool = False
    """Also export `policy_guided`, which serves classifier-free guidance (beta > 1)."""
    max_abs: float = field(default=1e-4)
    """Largest accepted difference from torch, in action units; above it nothing is published."""


def export(argv: list[str]) -> int:
    """Export, check parity, publish."""
    args = tyro.cli(ExportArgs, args=argv, prog="recap export", description=ExportArgs.__doc__)
    from exporters.parity import Tolerance
    from exporters.repository import export_checkpoint

    for checkpoint in args.checkpoints:
        for manifest in export_checkpoint(
            checkpoint, args.out, guided=args.guided, tolerance=Tolerance(max_abs=args.max_abs)
        ):
            print(
                f"{checkpoint} -> {args.out}: max abs {manifest.metrics['max_abs']:.1e}, "
                f"cosine {manifest.metrics['cosine']:.7f}"
            )
    return 0
