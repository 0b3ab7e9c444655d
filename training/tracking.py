"""Training metrics: always a `metrics.jsonl`, and TensorBoard or W&B when asked."""

import json
import os
from pathlib import Path
from typing import Any

TRACKERS = ("none", "tensorboard", "wandb")


class Tracker:
    """Writes one JSON object a line. On resume, lines of steps that will be run again are dropped, and so is a line
    that was cut when the process was killed."""

    def __init__(self, folder: Path, kind: str, start: int, *, name: str) -> None:
        if kind not in TRACKERS:
            raise ValueError(f"tracker: expected one of {', '.join(TRACKERS)}, got {kind!r}")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        old = path.read_text().split("\n")[:-1] if path.is_file() else []  # what follows the last newline is cut
        kept = [line for line in old if line and json.loads(line)["step"] <= start]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a")
        self._board = _board(kind, folder, name)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board(step, values)

    def close(self) -> None:
        self._file.close()


def _board(kind: str, folder: Path, name: str) -> Any:
    """A function (step, values) that logs to the chosen service, or None."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def write(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return write
    if kind == "wandb":
        import wandb

        run = wandb.init(project="recap", name=name, dir=str(folder))
        return lambda step, values: run.log(values, step=step)
    return None
