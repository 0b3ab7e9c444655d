"""System shared memory slots: a request's tensors lie where Triton reads and writes them, and are not sent."""

import contextlib
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.triton_api import Part, Tensor, TritonError

_FOLDER = Path("/dev/shm")
_ALIGN = 64
_QUARANTINE_S = 30.0
_SLOTS = 16


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in a slot that has room for `count` samples. offsets by name; size: bytes of the slot."""

    offsets: Mapping[str, int]
    size: int

    @staticmethod
    def of(tensors: Sequence[Tensor], count: int) -> "Layout":
        offsets, at = {}, 0
        for tensor in tensors:
            offsets[tensor.name] = at
            at += -(-count * tensor.nbytes // _ALIGN) * _ALIGN
        return Layout(offsets, max(at, _ALIGN))


class Slot:
    """One region. Its name in the file system goes as soon as Triton has mapped it, so nothing is left behind by a
    process that is killed."""

    def __init__(self, size: int) -> None:
        """Raises OSError when the machine has no room for it, or no POSIX shared memory."""
        self.name = f"recap-{os.getpid()}-{secrets.token_hex(8)}"
        self._path = _FOLDER / self.name
        handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(handle, 0, size)  # a full file system is an error here, and a SIGBUS later
            self._memory = mmap.mmap(handle, size)
        except BaseException:
            self.unlink()
            raise
        finally:
            os.close(handle)

    @property
    def key(self) -> str:
        """What `shm_open` calls it."""
        return f"/{self.name}"

    def unlink(self) -> None:
        self._path.unlink(missing_ok=True)

    def put(self, tensor: Tensor, array: NDArray[Any], offset: int) -> Part:
        """Copy [B, ...] in."""
        view = np.frombuffer(self._memory, tensor.dtype, array.size, offset)
        np.copyto(view.reshape(array.shape), array)
        return Part(tensor, len(array), region=self.name, offset=offset)

    def get(self, tensor: Tensor, count: int, offset: int) -> bytes:
        """Copy out what Triton wrote."""
        return self._memory[offset : offset + count * tensor.nbytes]

    def close(self) -> None:
        with contextlib.suppress(BufferError):
            self._memory.close()


class Slots:
    """As many slots as there were ever calls under way at once, up to a limit. register: see `Transport.register`;
    refused: told why, when Triton or the machine will have none."""

    def __init__(
        self, size: int, register: Callable[[str, str, int, float], None], refused: Callable[[str], None]
    ) -> None:
        self._size, self._register, self._refused = size, register, refused
        self._lock = threading.Lock()
        self._free: list[Slot] = []
        self._aside: list[tuple[float, Slot]] = []
        self._known: set[Slot] = set()
        self._usable = True

    def take(self, timeout_s: float) -> Slot | None:
        """A slot, registered with Triton; None = send the tensors. Raises TritonError when it cannot be asked."""
        with self._lock:
            now = time.monotonic()
            while self._aside and now - self._aside[0][0] > _QUARANTINE_S:
                self._free.append(self._aside.pop(0)[1])
            if self._free:
                return self._free.pop()
            if not self._usable or len(self._known) >= _SLOTS:
                return None
        return self._make(timeout_s)

    def give(self, slot: Slot) -> None:
        """Back, after an answer. One that Triton may have forgotten is thrown away."""
        with self._lock:
            if slot in self._known:
                self._free.append(slot)
                return
        slot.close()

    def set_aside(self, slot: Slot) -> None:
        """After a call without an answer: Triton may yet read from it, and write to it."""
        with self._lock:
            if slot in self._known:
                self._aside.append((time.monotonic(), slot))

    def reset(self) -> None:
        """Triton has been away: it knows none of these any more. Free ones go now, others as they are given back."""
        with self._lock:
            for slot in (*self._free, *(slot for _, slot in self._aside)):
                slot.close()
            self._free, self._aside, self._known, self._usable = [], [], set(), True

    def names(self) -> list[str]:
        """Of all slots that Triton knows."""
        with self._lock:
            return [slot.name for slot in self._known]

    def _make(self, timeout_s: float) -> Slot | None:
        slot = None
        try:
            slot = Slot(self._size)
            self._register(slot.name, slot.key, self._size, timeout_s)
        except (OSError, TritonError) as error:
            if slot is not None:
                slot.close()
            if isinstance(error, TritonError) and error.reason in ("unreachable", "timeout"):
                raise
            self._usable = False
            self._refused(str(error))
            return None
        finally:
            if slot is not None:
                slot.unlink()
        with self._lock:
            self._known.add(slot)
        return slot
