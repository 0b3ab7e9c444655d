"""What Triton needs beside a model's versions: `config.pbtxt`, warm-up data, and `model.py` for the python backend."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from exporters import triton_model
from exporters.triton_config import WARM_UP_FOLDER, Arrays, TritonOptions, config_pbtxt, tensor_lines, warm_up_files
from recap_model.manifest import read_manifest

_HASHED = {"spec": "spec.json", "parity": "parity.json"}


def write_backend(version: Path, options: TritonOptions) -> None:
    """Put into a version folder what the backend asks for; before its manifest is written."""
    if options.backend == "python":
        shutil.copyfile(triton_model.__file__, version / "model.py")


def write_configuration(
    folder: Path, inputs: Arrays, outputs: Arrays, batch_sizes: Sequence[int], options: TritonOptions, name: str
) -> None:
    """Write `config.pbtxt` and warm-up data of the model folder `folder`, for the versions that are in it.

    Arrays are examples with a leading batch dimension.
    """
    data = folder / WARM_UP_FOLDER
    data.mkdir(exist_ok=True)
    for file, content in warm_up_files(inputs).items():
        (data / file).write_bytes(content)
    text = config_pbtxt(
        name,
        inputs,
        outputs,
        max(batch_sizes),
        options,
        batch_sizes=sorted(batch_sizes),
        parameters=identities(folder),
        warm_up=True,
    )
    temporary = folder / ".config.pbtxt.tmp"
    temporary.write_text(text)
    os.replace(temporary, folder / "config.pbtxt")  # Triton may be reading it


def identities(folder: Path) -> dict[str, str]:
    """Configuration parameters by which a service sees that Triton runs what its own folder holds: for each version
    `recap.VERSION.model` (content hash of the folder), `.spec` and `.parity` (sha256 of the files), hex."""
    numbers = sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdecimal())
    found = {}
    for version in (folder / str(number) for number in numbers):
        found[f"recap.{version.name}.model"] = read_manifest(version, "model").hash
        for key, file in _HASHED.items():
            found[f"recap.{version.name}.{key}"] = hashlib.sha256((version / file).read_bytes()).hexdigest()
    return found


def require_same_tensors(folder: Path, inputs: Arrays, outputs: Arrays) -> None:
    """Refuse a version whose inputs or outputs are not those of the versions that `folder` holds: Triton has one
    configuration for all versions of a model."""
    path = folder / "config.pbtxt"
    if not path.is_file():
        return
    there = [line for line in path.read_text().splitlines() if line.startswith(("input {", "output {"))]
    wanted = tensor_lines(inputs, outputs)
    if different := sorted(set(there) ^ set(wanted)):
        raise ValueError(
            f"{path}: expected a version with the inputs and outputs of the others, got another: "
            f"{'; '.join(different)}; export it without --version, or into another repository"
        )
