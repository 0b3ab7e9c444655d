"""Decoded frames on disk instead of in memory: one memory-mapped file for each dataset, written once and reused.

Batches are the same bytes either way. The operating system keeps in memory what it has room for.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]


class FrameCacheError(OSError):
    """Frames cannot be kept on disk."""


@dataclass(frozen=True)
class Frames:
    """kind: where decoded frames are kept. cache: folder for "disk"; several runs and processes may share it."""

    kind: Literal["memory", "disk"] = "memory"
    cache: Path = Path("frames")

    def images(self, name: str, shape: tuple[int, ...], fill: Callable[[Images], None]) -> Images:
        """uint8 of `shape`, as `fill` writes them; with "disk" read-only, and filled only when the cache has none under
        `name` (which must say what is in it) that is whole. Raises FrameCacheError when there is no room."""
        if self.kind == "memory":
            made = np.empty(shape, np.uint8)
            fill(made)
            return made
        self.cache.mkdir(parents=True, exist_ok=True)
        path = self.cache / f"{name}-{'x'.join(map(str, shape))}.npy"
        with alone(path.with_suffix(".lock")):
            found = _read(path, shape)
            return _write(path, shape, fill) if found is None else found


MEMORY = Frames()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time; a process that dies lets go of it."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _read(path: Path, shape: tuple[int, ...]) -> Images | None:
    """The file as an array, or None when it is missing, cut or something else."""
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.uint8 else None


def _write(path: Path, shape: tuple[int, ...], fill: Callable[[Images], None]) -> Images:
    needed = int(np.prod(shape, dtype=np.int64))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise FrameCacheError(
            f"{path.parent}: expected room for {needed / 1e9:.1f} GB of decoded frames, got {free / 1e9:.1f} GB; give "
            "another folder with --cache, or train on fewer episodes or smaller frames"
        )
    temporary = path.with_suffix(".tmp")
    try:
        made = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        fill(made)
        made.flush()
        del made
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    written: Images = np.load(path, mmap_mode="r")
    return written
