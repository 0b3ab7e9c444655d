"""`recap export`."""

from dataclasses import dataclass
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
    target: Literal["onnx", "torch", "tensorrt"] = "onnx"
    """onnx: for `recap serve` and Triton. torch: for `recap serve --engine torch`. tensorrt: a plan for this machine's
    GPU."""
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Of the policy's matrix products: fp16 for GPUs, int8 for CPUs (look at the error it prints)."""
    guided: bool = False
    """Also export `policy_guided`, which serves classifier-free guidance (beta > 1)."""
    rtc: bool = False
    """With the inputs of real-time chunking; a client that sends none is served as without."""
    backend: Literal["onnxruntime", "tensorrt", "python"] | None = None
    """What runs the model inside Triton: onnxruntime and tensorrt are the backends of NVIDIA's image, python is
    onnxruntime in a model.py, which every Triton runs. By default that of the target."""
    triton_version: str = "2.51"
    """Oldest Triton that has to read config.pbtxt."""
    triton_instances: int = 1
    """Copies of the model in Triton, each of which runs a batch at a time."""
    version: int | None = None
    """Add the model as this version beside the others; without it, the model becomes version 1 and the only one."""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Batch sizes that will be served; each costs memory and is compared with torch. 1 for a large model on a CPU."""
    max_abs: float | None = None
    """Largest accepted difference from torch, in action units; above it nothing is published. By default 1e-4 in fp32;
    other formats are held to their cosine."""


def export(argv: list[str]) -> int:
    """Export, check parity, publish."""
    args = tyro.cli(ExportArgs, args=argv, prog="recap export", description=ExportArgs.__doc__)
    from exporters.repository import ExportOptions, export_checkpoint
    from exporters.triton_config import TritonOptions

    backend = args.backend or ("tensorrt" if args.target == "tensorrt" else "onnxruntime")
    untold = args.target == "torch" and args.backend is None
    triton = None if untold else TritonOptions(backend, args.triton_version, args.triton_instances)
    options = ExportOptions(
        args.target,
        args.precision,
        args.guided,
        args.rtc,
        args.batch_sizes,
        args.max_abs,
        triton,
        args.version,
    )
    for checkpoint in args.checkpoints:
        for manifest in export_checkpoint(checkpoint, args.out, options):
            print(
                f"{checkpoint} -> {args.out}: {manifest.parameters['precision']}, against torch: max abs "
                f"{manifest.metrics['max_abs']:.1e}, cosine {manifest.metrics['cosine']:.7f}"
            )
    return 0
