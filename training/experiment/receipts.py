"""What a finished stage leaves behind so that it is recognised: its command and the hashes of what it read and wrote.

The folders carry manifests of their own; a receipt ties them to the command, so that changed parameters, changed inputs
or a damaged output make the stage run again, and nothing else does.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recap_model.manifest import content_hash
from training.experiment.stages import Stage

State = Literal["done", "partial", "stale", "new"]


@dataclass(frozen=True)
class Receipts:
    """Receipts of the stages of one run, in `<run>/stages/`."""

    run: Path

    def state(self, stage: Stage) -> State:
        """done: finished with this command, inputs and outputs. partial: started with this command and inputs, not
        finished. stale: started or finished with others. new: never started."""
        path = self._path(stage)
        if not path.is_file():
            return "new"
        try:
            receipt = json.loads(path.read_text())
        except ValueError:
            return "stale"
        if {key: receipt.get(key) for key in ("command", "inputs", "serve")} != self._asked(stage):
            return "stale"
        if receipt.get("outputs") is None:
            return "partial"
        return "done" if receipt["outputs"] == self._hashes(stage.outputs) else "partial"

    def start(self, stage: Stage) -> None:
        """Note that a stage begins; what it wrote with other parameters is removed, recordings go to replaced/."""
        if self.state(stage) == "stale":
            for output in stage.outputs:
                if stage.command[0] == "collect":
                    _keep(self.run / output, self.run / "replaced")
                _remove(self.run / output)
                _remove(self.run / (output + ".work"))  # resumable training state of other parameters
        self._write(stage, None)

    def finish(self, stage: Stage, seconds: float) -> None:
        """Note that a stage is done. Raises FileNotFoundError when it left an output unwritten."""
        missing = [output for output in stage.outputs if not (self.run / output).exists()]
        if missing:
            raise FileNotFoundError(f"stage {stage.name!r} ended without an error, but wrote no {', '.join(missing)}")
        self._write(stage, self._hashes(stage.outputs), seconds)

    def _asked(self, stage: Stage) -> dict[str, Any]:
        serve = None if stage.serve is None else [stage.serve.models, stage.serve.beta, stage.serve.critic]
        return {"command": list(stage.command), "inputs": self._hashes(stage.inputs), "serve": serve}

    def _hashes(self, paths: tuple[str, ...]) -> dict[str, str | None]:
        return {path: fingerprint(self.run / path) for path in paths}

    def _write(self, stage: Stage, outputs: dict[str, str | None] | None, seconds: float | None = None) -> None:
        path = self._path(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        receipt = {**self._asked(stage), "outputs": outputs, "seconds": seconds}
        temporary.write_text(json.dumps(receipt, indent=1) + "\n")
        os.replace(temporary, path)

    def _path(self, stage: Stage) -> Path:
        return self.run / "stages" / f"{stage.name.replace(' ', '-')}.json"


def fingerprint(path: Path) -> str | None:
    """What a file or folder holds, as a hash: a manifest's if there is one, else over the bytes; None if missing."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if not path.is_dir():
        return None
    return content_hash(path)  # not what its manifest says: a damaged folder is made again


def _keep(path: Path, folder: Path) -> None:
    """Move `path` into `folder` under a name that is free: what a robot has recorded is never deleted."""
    if path.exists():
        folder.mkdir(exist_ok=True)
        name = f"{path.parent.name}-{path.name}"
        path.rename(next(place for i in range(10_000) if not (place := folder / f"{name}-{i}").exists()))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
