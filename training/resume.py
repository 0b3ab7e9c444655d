"""The resumable state of a run: `state.safetensors` in its work folder, replaced as a whole or not at all."""

import json
import os
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.optim import Average
from training.settings import FitSettings

STATE = "state.safetensors"


class ResumeError(ValueError):
    """A work folder was written by a run with other settings, or cannot be read."""


@dataclass(frozen=True)
class Position:
    """Where a run stands. step: optimiser steps done; recent: losses since the last line of the metrics."""

    step: int = 0
    recent: tuple[float, ...] = ()


@dataclass(frozen=True)
class Run:
    """What a state consists of. identity: everything that must be the same for a resume (JSON)."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average
    identity: dict[str, Any]

    def save(self, work: Path, position: Position) -> None:
        """Write the state beside the old one, then replace it: a crash leaves the one or the other."""
        work.mkdir(parents=True, exist_ok=True)
        _sweep(work)
        tensors = {f"weight.{n}": p.detach() for n, p in self.module.named_parameters()}
        tensors |= {f"average.{n}": p for n, p in self.average.shadow.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        metadata = {"step": str(position.step), "recent": json.dumps(position.recent)}
        metadata["identity"] = json.dumps(self.identity, sort_keys=True)
        temporary = work / "state.tmp"
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(temporary, work / STATE)

    def restore(self, work: Path) -> Position:
        """Load the state in `work` if there is one. Raises ResumeError for another run's, or a damaged one."""
        path = work / STATE
        if not path.is_file():
            return Position()
        try:
            with safe_open(path, "pt") as stream:
                meta = stream.metadata()
            self._require_same(work, json.loads(meta["identity"]))
            tensors = load_file(path)
        except SafetensorError as error:
            raise ResumeError(
                f"{path}: expected the state of an unfinished run, got a damaged file ({error}); "
                "remove it to start over"
            ) from error
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
                self.average.shadow[name].copy_(tensors[f"average.{name}"])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = _laid_out_as(parameters[int(index)].detach(), value)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        return Position(int(meta["step"]), tuple(json.loads(meta.get("recent", "[]"))))

    def _require_same(self, work: Path, before: dict[str, Any]) -> None:
        before, identity = _completed(before), _completed(self.identity)
        if before == identity:
            return
        keys = sorted(k for k in {*before, *identity} if before.get(k) != identity.get(k))
        raise ResumeError(
            f"{work}: holds an unfinished run with other {', '.join(keys)}: expected "
            f"{[identity.get(k) for k in keys]}, got {[before.get(k) for k in keys]}; "
            "finish it with the old settings or remove the folder"
        )


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment of `parameter` with its strides: the fused optimiser walks both through memory side by side, and in a
    channels-last weight the moments of a contiguous copy would go to other entries."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value) if value.shape == parameter.shape else value


def _completed(identity: dict[str, Any]) -> dict[str, Any]:
    """With the default of every loop setting that did not exist yet when the state was written."""
    known = {f.name: f.default for f in fields(FitSettings) if f.default is not MISSING}
    filled = dict(identity)
    if isinstance(fit := identity.get("fit"), dict):
        filled["fit"] = {**known, **fit}
    if isinstance(settings := identity.get("settings"), dict):
        filled["settings"] = _completed(settings)
    return filled


def forget_state(work: Path) -> None:
    """Remove the resumable states below `work` once their run is published; metrics stay."""
    for path in [*work.rglob(STATE)]:
        path.unlink()
        _sweep(path.parent)


def _sweep(work: Path) -> None:
    """Remove what a killed process left of a state, which can be as large. safetensors writes to `.tmp*` first."""
    for path in [*work.glob("state.tmp"), *work.glob(".tmp*")]:
        path.unlink(missing_ok=True)
