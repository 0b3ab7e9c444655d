"""Mixture files: the datasets of a pre-training and their shares of every batch."""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = "mixture.json"
"""What a checkpoint that was trained on a mixture holds besides the usual: its datasets, their robots and shares."""
_KEYS = {"dataset", "weight", "name", "labels", "expert"}


class MixtureError(ValueError):
    """A mixture file is malformed, or its datasets cannot be trained on together."""


@dataclass(frozen=True)
class Member:
    """A dataset of a mixture. weight: share of the frames of every batch, relative to the other members'. labels: a
    folder of `recap label`; expert: every frame is positive instead. With neither, prompts have no advantage clause."""

    name: str
    dataset: Path
    weight: float
    labels: Path | None = None
    expert: bool = False


@dataclass(frozen=True)
class Mixture:
    """Members with distinct names. path: the file that they are from. serve: the member whose robot the checkpoint
    serves; "" = the first."""

    path: Path
    members: tuple[Member, ...]
    serve: str = ""

    @property
    def shares(self) -> NDArray[np.float64]:
        """Expected share of each member in a batch, adding up to 1."""
        weights = np.array([member.weight for member in self.members])
        return weights / weights.sum()

    @property
    def served(self) -> int:
        """Index of the member whose robot is served."""
        names = [member.name for member in self.members]
        if self.serve and self.serve not in names:
            raise MixtureError(
                f"--serve: expected the name of a dataset of {self.path}, in {names}, got {self.serve!r}"
            )
        return names.index(self.serve) if self.serve else 0


def read_mixture(path: Path, serve: str = "") -> Mixture:
    """Read a mixture file: JSON (a list of datasets, or an object with the key `datasets`) or TOML (`[[datasets]]`).

    Paths in it are relative to the file. Raises MixtureError naming the entry.
    """
    if not path.is_file():
        raise MixtureError(f"{path}: expected a mixture file (.json or .toml), got none")
    try:
        data = tomllib.loads(path.read_text()) if path.suffix == ".toml" else json.loads(path.read_text())
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise MixtureError(f"{path}: expected {kind}, got text that is none ({error})") from error
    entries = data.get("datasets") if isinstance(data, dict) else data
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise MixtureError(
            f'{path}: expected a list of datasets, as [{{"dataset": "folder", "weight": 1.0}}], got {str(data)[:80]}'
        )
    mixture = Mixture(path, tuple(_member(path, number, entry) for number, entry in enumerate(entries)), serve)
    names = [member.name for member in mixture.members]
    if len(set(names)) != len(names):
        raise MixtureError(f"{path}: expected datasets with distinct names, got {names}; give them a `name` each")
    _ = mixture.served
    return mixture


def _member(path: Path, number: int, entry: Mapping[str, Any]) -> Member:
    where = f"{path}: datasets[{number}]"
    if unknown := sorted(set(entry) - _KEYS):
        raise MixtureError(f"{where}: expected the keys {sorted(_KEYS)}, got also {unknown}")
    texts = {key: entry.get(key) for key in ("dataset", "labels", "name")}
    if not isinstance(texts["dataset"], str):
        raise MixtureError(f"{where}.dataset: expected the folder of a dataset, got {texts['dataset']!r}")
    for key in ("labels", "name"):
        if texts[key] is not None and not isinstance(texts[key], str):
            raise MixtureError(f"{where}.{key}: expected text, got {texts[key]!r}")
    weight, expert = entry.get("weight", 1.0), entry.get("expert", False)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not (0 < weight < math.inf):
        raise MixtureError(f"{where}.weight: expected a positive number, got {weight!r}")
    if not isinstance(expert, bool):
        raise MixtureError(f"{where}.expert: expected true or false, got {expert!r}")
    if expert and texts["labels"] is not None:
        raise MixtureError(f"{where}: expected `labels` or `expert = true` (every frame is positive), got both")
    folder = path.parent / texts["dataset"]
    name = texts["name"] if texts["name"] is not None else folder.resolve().name
    if not name or "/" in name:
        raise MixtureError(f"{where}.name: expected a name without '/', got {name!r}")
    labels = None if texts["labels"] is None else path.parent / texts["labels"]
    return Member(name, folder, float(weight), labels, expert)
