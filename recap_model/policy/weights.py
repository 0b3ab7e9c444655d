"""Weights from safetensors files, strictly: every difference is named, and nothing that could run code is opened."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

FILE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHOWN = 8
_RESAVE = (
    "pickles are never opened, because opening one runs whatever code it holds. Where the file came from, re-save it "
    "with safetensors: `safetensors.torch.save_file(state_dict, 'model.safetensors')`"
)


class WeightsError(ValueError):
    """A weights file is missing, damaged, not safetensors, or of another model."""


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy the weights at `path` (a safetensors file, or a folder with model.safetensors) into `module`.

    Every parameter must be there with its shape, and nothing else. bfloat16 and float16 are widened to the module's
    float32. Raises WeightsError; the module is unchanged then.
    """
    assign(module, read_weights(path), path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file (or of the model.safetensors in a folder), on the CPU. Raises WeightsError."""
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        pickled = sorted(p.name for pattern in _PICKLED for p in path.parent.glob(pattern))
        if pickled:
            raise WeightsError(f"{path}: expected a safetensors file, got only {', '.join(pickled)}: {_RESAVE}")
        raise WeightsError(f"{path}: expected a safetensors file, got none")
    _require_safetensors(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(
            f"{path}: expected a whole safetensors file, got one that is damaged or cut off ({error}); copy it again"
        ) from error


def assign(module: nn.Module, tensors: dict[str, Tensor], where: object) -> None:
    """Copy `tensors` (name -> values) into `module`; the WeightsError that lists all differences names `where`."""
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    extra = sorted(tensors.keys() - own.keys())
    wrong = [
        f"{name} (expected {_describe(own[name])}, got {_describe(tensors[name])})"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape or own[name].is_floating_point() != tensors[name].is_floating_point()
    ]
    parts = [
        f"{len(names)} {what}: {_first(names)}"
        for what, names in (("missing", missing), ("unknown", extra), ("of another shape or type", wrong))
        if names
    ]
    if parts:
        raise WeightsError(
            f"{where}: expected the {len(own)} tensors of this model, got a file that differs: "
            + "; ".join(parts)
            + ". It was made for another configuration, or by another model class"
        )
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(tensors[name])


def _require_safetensors(path: Path) -> None:
    """The first bytes tell: a length (8 bytes) and the JSON header that it measures."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(9)
    length = int.from_bytes(head[:8], "little")
    if len(head) == 9 and head[8:] == b"{" and length <= size - 8:
        return
    if head[:1] == b"\x80" or head[:2] == b"PK":
        raise WeightsError(f"{path}: expected a safetensors file, got a pickle: {_RESAVE}")
    if head[8:] == b"{":
        raise WeightsError(
            f"{path}: expected a whole safetensors file, got one cut off after {size} bytes "
            f"(its header alone has {length}); copy it again"
        )
    raise WeightsError(f"{path}: expected a safetensors file, got {size} bytes that begin with {head!r}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _first(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
