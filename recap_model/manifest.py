"""`manifest.json`: what a folder holds, from what it was made, and whether it is whole. Standard library only.

Every stage writes its folder under a temporary name, writes the manifest last and renames (`publish`), so that a folder
with a manifest is a finished one and an interrupted stage leaves nothing that looks finished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = 1
NAME = "manifest.json"


class ManifestError(ValueError):
    """A folder has no manifest, or one of another kind, schema or content than expected."""


@dataclass(frozen=True)
class Manifest:
    """kind: what the folder is ("dataset", "returns", "critic", ...). parents: role -> content hash of what it was
    made from. parameters: every setting that shaped it. metrics: what was measured.
    hash: over the files, see `content_hash`.
    """

    kind: str
    hash: str
    parents: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    commit: str = "unknown"
    created: str = ""
    schema: int = SCHEMA


def content_hash(folder: Path) -> str:
    """sha256 over the names and bytes of all files below `folder` except the manifest itself, as hex."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / NAME):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def write_manifest(
    folder: Path,
    kind: str,
    *,
    parents: dict[str, str] | None = None,
    parameters: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> Manifest:
    """Hash `folder` and write its manifest (atomically)."""
    manifest = Manifest(
        kind,
        content_hash(folder),
        dict(parents or {}),
        dict(parameters or {}),
        dict(metrics or {}),
        commit=source_commit(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    temporary = folder / (NAME + ".tmp")
    temporary.write_text(json.dumps(asdict(manifest), indent=1, sort_keys=True, default=str) + "\n")
    os.replace(temporary, folder / NAME)
    return manifest


def read_manifest(folder: Path, kind: str | None = None) -> Manifest:
    """Read a manifest; refuse a missing one, another schema, or another kind than `kind`."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise ManifestError(f"{folder}: expected a folder with a {NAME}, got none: not finished, or not made by recap")
    data = json.loads(path.read_text())
    if data.get("schema") != SCHEMA:
        raise ManifestError(f"{path}: schema: expected {SCHEMA}, got {data.get('schema')}")
    if kind is not None and data.get("kind") != kind:
        raise ManifestError(f"{path}: kind: expected {kind!r}, got {data.get('kind')!r}")
    return Manifest(**data)


def verify(folder: Path, kind: str | None = None) -> Manifest:
    """`read_manifest`, then compare the content hash with the files."""
    manifest = read_manifest(folder, kind)
    actual = content_hash(Path(folder))
    if actual != manifest.hash:
        raise ManifestError(
            f"{folder}: content hash: expected {manifest.hash[:12]} (manifest), got {actual[:12]} (files)"
        )
    return manifest


def require_parent(manifest: Manifest, role: str, expected: str, *, where: object) -> None:
    """Refuse a folder that was made from something else than what stands here now."""
    got = manifest.parents.get(role)
    if got != expected:
        raise ManifestError(
            f"{where}: made from another {role}: expected hash {expected[:12]}, got {str(got)[:12]}; "
            f"make it again for this {role}"
        )


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder; on success rename it to `folder` (replacing an old one), on error remove it."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sweep(folder: Path) -> None:
    """Remove what killed processes (and an earlier try of this one) left while publishing `folder`."""
    for path in folder.parent.glob(f".{folder.name}.*.tmp"):
        pid = path.name.removeprefix(f".{folder.name}.").split(".")[0]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def source_commit() -> str:
    """The source commit, read from the checkout without running git; "unknown" in an installed package."""
    git = Path(__file__).resolve().parent.parent / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        return (git / head[5:]).read_text().strip() if head.startswith("ref: ") else head
    except OSError:
        return "unknown"
