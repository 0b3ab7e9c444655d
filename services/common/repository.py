"""A model folder of the repository that `recap export` writes: found, verified, and its spec and tokenizer read."""

from dataclasses import dataclass
from pathlib import Path

from recap_model.manifest import Manifest, verify
from recap_model.spec import Spec, read_spec
from recap_model.tokenizer import TextTokenizer


class RepositoryError(ValueError):
    """A model repository lacks the model, a version of it, or a file of that version."""


@dataclass(frozen=True)
class ModelFolder:
    """One version of one model, verified against its manifest."""

    name: str
    version: str
    path: Path
    manifest: Manifest
    spec: Spec
    tokenizer: TextTokenizer

    @property
    def hash(self) -> str:
        """Content hash of the version's folder, hex."""
        return self.manifest.hash


def versions_of(folder: Path) -> list[int]:
    """The versions in a model's folder, ascending."""
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdecimal())


def open_model(models: Path, name: str, version: int | None = None) -> ModelFolder:
    """A version of `name` below `models`; None = the highest.

    Raises RepositoryError if it is not there, ManifestError if it is unfinished or was changed after the export.
    """
    folder = Path(models) / name
    if not folder.is_dir():
        there = sorted(p.name for p in Path(models).iterdir() if p.is_dir()) if Path(models).is_dir() else []
        raise RepositoryError(
            f"{models}: expected a model repository with a folder {name!r}, got "
            f"{there or 'no such folder'}; make one with `recap export CHECKPOINT --out {models}`"
        )
    versions = versions_of(folder)
    if not versions:
        raise RepositoryError(f"{folder}: expected a version folder such as 1, got none")
    if version is not None and version not in versions:
        raise RepositoryError(f"{folder}: expected a version folder {version}, got {versions}")
    path = folder / str(versions[-1] if version is None else version)
    manifest = verify(path, "model")
    for needed in ("spec.json", "tokenizer.json"):
        if not (path / needed).is_file():
            raise RepositoryError(f"{path}: expected a file {needed}, got none; export the model again")
    spec = read_spec(path / "spec.json")
    return ModelFolder(
        name, path.name, path, manifest, spec, TextTokenizer.load(path / "tokenizer.json", spec.max_tokens)
    )


def has_model(models: Path, name: str) -> bool:
    return (Path(models) / name).is_dir()
