"""The encodings of GR00T's policy server: msgpack, with arrays as `np.save` files (N1.5, N1.6) or as PyPI's
msgpack-numpy writes them (N1.7). Input is hostile until checked; object arrays and pickles do not exist here."""

import io
import json
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from recap_client import wire
from services.common.errors import ServiceError, bad_field

_format: Any = np.lib.format  # without types in numpy
_KINDS = "biufUS"
_MAX_DIMS = 8
_MAX_LENGTH = 1 << 12  # of one list or map; msgpack makes room for it before the first item is read
_MAX_NODES = 20_000
_HEADER = 512  # bytes; numpy writes 118 or so
_NPY, _ND, _CONFIG = "__ndarray_class__", "nd", "__ModalityConfig_class__"


class Arrays(Enum):
    """How a peer writes arrays."""

    NPY = "as_npy"
    ND = "msgpack-numpy"


def unpack(data: bytes, limit: int) -> tuple[dict[str, Any], Arrays | None]:
    """One request, and how its arrays were written (None when it has none). Raises ServiceError."""
    if len(data) > limit:
        raise bad_field("too_large", "message", f"at most {limit} bytes", f"{len(data)} bytes")
    budget = _Budget()
    try:
        raw = msgpack.unpackb(data, max_array_len=_MAX_LENGTH, max_map_len=_MAX_LENGTH, max_ext_len=0,
                              list_hook=budget.take, object_hook=budget.take)  # fmt: skip
    except ServiceError:
        raise
    except Exception as error:  # msgpack raises ValueError, TypeError, its own kinds and RecursionError by input
        raise bad_field(
            "bad_message", "message", "one msgpack map", f"{type(error).__name__}: {error}"[:120]
        ) from error
    if not isinstance(raw, dict):
        raise bad_field("bad_message", "message", "a map with an endpoint", type(raw).__name__)
    reader = _Reader()
    return reader.map(raw, ""), reader.arrays


def pack(message: Any, arrays: Arrays) -> bytes:
    """A reply of maps, lists, text, numbers and arrays."""

    def encode(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            raise TypeError(type(value).__name__)
        return _as_npy(value) if arrays is Arrays.NPY else _as_nd(value)

    packed: bytes = msgpack.packb(message, default=encode)
    return packed


def modality_config(delta_indices: list[int], keys: list[str], *, as_text: bool) -> dict[str, Any]:
    """A `ModalityConfig`, which all versions read: N1.5 as JSON text, later ones as a map."""
    config = {"delta_indices": delta_indices, "modality_keys": keys}
    return {_CONFIG: True, "as_json": json.dumps(config) if as_text else config}


class _Budget:
    """Counts what a message holds while it is parsed, so that a hostile one ends before it has filled the memory."""

    def __init__(self) -> None:
        self._left = _MAX_NODES

    def take(self, container: Any) -> Any:
        self._left -= 1 + len(container)
        if self._left < 0:
            raise bad_field("too_large", "message", f"at most {_MAX_NODES} values beside arrays", "more")
        return container


class _Reader:
    """Walks a message after msgpack, so that an error names the field."""

    def __init__(self) -> None:
        self.arrays: Arrays | None = None

    def map(self, raw: Mapping[Any, Any], path: str) -> dict[str, Any]:
        named = {key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key): raw[key] for key in raw}
        return {key: self.value(item, f"{path}.{key[:40]}" if path else key[:40]) for key, item in named.items()}

    def value(self, raw: Any, path: str) -> Any:
        if isinstance(raw, list):
            return [self.value(item, f"{path}[{index}]") for index, item in enumerate(raw)]
        if not isinstance(raw, dict):
            if isinstance(raw, msgpack.ExtType | msgpack.Timestamp):
                raise bad_field("bad_message", path, "plain msgpack types", type(raw).__name__)
            return raw
        if _NPY in raw:
            self.arrays = Arrays.NPY
            return _from_npy(raw.get("as_npy"), path)
        if _ND.encode() in raw or _ND in raw:
            self.arrays = Arrays.ND
            return _from_nd(raw, path)
        return self.map(raw, path)


def _from_npy(data: Any, path: str) -> NDArray[Any]:
    """`np.load` allocates what a header announces; here the header is held against the bytes first."""
    if not isinstance(data, bytes):
        raise bad_field("bad_message", f"{path}.as_npy", "the bytes of a .npy file", type(data).__name__)
    head = io.BytesIO(data[: 12 + _HEADER])
    try:
        version = _format.read_magic(head)
        reader = {(1, 0): _format.read_array_header_1_0, (2, 0): _format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(head, max_header_size=_HEADER)
    except Exception as error:  # numpy parses the header as a Python literal, which fails in many ways
        raise bad_field("bad_message", path, "a .npy file of numbers or text", f"{error}"[:80] or "none") from error
    return _checked(data[head.tell() :], dtype, shape, path, "F" if fortran else "C")


def _from_nd(raw: Mapping[Any, Any], path: str) -> Any:
    parts = {key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key): raw[key] for key in raw}
    name, data = parts.get("type"), parts.get("data")
    if isinstance(name, bytes):
        name = name.decode("utf-8", "replace")
    if not isinstance(name, str) or not 1 < len(name.lstrip("<>|=")) <= 8 or not isinstance(data, bytes):
        raise bad_field("bad_message", path, "type and data of an array", f"type {str(name)[:20]!r}")
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError) as error:
        raise bad_field("bad_message", f"{path}.type", "a dtype", name) from error
    if parts.get("nd") is not True:
        return _checked(data, dtype, (1,), path, "C")[0].item()
    shape = parts.get("shape")
    return _checked(data, dtype, tuple(shape) if isinstance(shape, list) else None, path, "C")


def _checked(data: bytes, dtype: "np.dtype[Any]", shape: Any, path: str, order: Any) -> NDArray[Any]:
    if dtype.kind not in _KINDS or not dtype.itemsize:
        raise bad_field("bad_message", path, f"a dtype of kind in {_KINDS!r}", str(dtype)[:40])
    if not isinstance(shape, tuple) or len(shape) > _MAX_DIMS or not all(type(n) is int and n > 0 for n in shape):
        raise bad_field("bad_message", path, f"up to {_MAX_DIMS} sizes from 1", str(shape)[:80])
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise bad_field(
            "bad_message", path, f"{expected} bytes for {dtype.str} {list(shape)}"[:120], f"{len(data)} bytes"
        )
    if dtype.kind == "U" and not wire.is_text(data, dtype):
        raise bad_field("bad_message", path, "text of Unicode characters", f"other numbers in {dtype.str}")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _as_npy(array: NDArray[Any]) -> dict[str, Any]:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return {_NPY: True, "as_npy": file.getvalue()}


def _as_nd(array: NDArray[Any]) -> dict[bytes, Any]:
    return {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}
