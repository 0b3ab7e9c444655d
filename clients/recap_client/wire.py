"""The binary encoding of every websocket message: msgpack with numpy arrays, byte for byte as openpi's `msgpack_numpy`.

An array is a map with bytes keys `{b"__ndarray__": True, b"data": bin, b"dtype": "<f4", b"shape": [...]}` and a numpy
scalar `{b"__npgeneric__": True, b"data": value, b"dtype": "<f4"}`. On input the same maps with str keys are taken too.
One addition: `{b"__jpeg__": True, b"data": bin}` is a `JpegImage`. Input is hostile until checked: dtype kinds, shapes
and lengths are verified before numpy sees them, and nothing is ever unpickled.
"""

import math
from typing import Any

import msgpack
import numpy as np

from recap_client.images import JpegImage

MAX_BYTES = 64 * 2**20
"""Default bound on one message: 16 cameras of 1024 x 1024 x 3 and room to spare."""

_MAX_DIMS = 8
_MAX_LENGTH = 1 << 12  # of one list or map; msgpack makes room for it before the first item is read
_MAX_VALUES = 20_000  # beside the contents of arrays; a byte of an empty map is 64 in memory
_MAX_LEVELS = 64
_KINDS = "biufUS"


class WireError(ValueError):
    """A message does not decode or encode. `field` is the path of the offending part ("" for the whole message)."""

    def __init__(self, field: str, expected: str, got: str) -> None:
        super().__init__(f"wire: {field or 'message'}: expected {expected}, got {got}")
        self.field, self.expected, self.got = field, expected, got


def pack(obj: Any) -> bytes:
    """Encode maps, lists, str, bytes, numbers, None, numpy arrays, numpy scalars and `JpegImage`.

    Raises WireError for arrays of object, void or complex dtype and for types msgpack does not know.
    """
    try:
        packed: bytes = msgpack.packb(obj, default=_encode)
    except WireError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError("", "maps, lists, text, numbers and numpy arrays", str(error)) from error
    return packed


def unpack(buffer: bytes | str, *, max_bytes: int = MAX_BYTES) -> Any:
    """Decode one message. Arrays are read-only, over the bytes that msgpack has copied out of `buffer`, once: it may be
    used again. Raises WireError, never anything else.

    A message above `max_bytes` is refused unread. A broken array is named by its path, e.g. `observation.images.front`.
    """
    if isinstance(buffer, str):
        raise WireError("", "a binary frame", "a text frame")
    if len(buffer) > max_bytes:
        raise WireError("", f"at most {max_bytes} bytes", f"{len(buffer)} bytes")
    budget = _Budget()
    try:
        raw = msgpack.unpackb(buffer, strict_map_key=True, max_array_len=_MAX_LENGTH, max_map_len=_MAX_LENGTH,
                              list_hook=budget.take, object_hook=budget.take)  # fmt: skip
    except WireError:
        raise
    except Exception as error:  # msgpack raises ValueError, TypeError, its own kinds and RecursionError by input
        raise WireError("", "one msgpack object", f"{type(error).__name__}: {error}") from error
    return _decode(raw, "", 0)


class _Budget:
    """Counts what a message holds while it is parsed, so that a hostile one ends before it has filled the memory."""

    def __init__(self) -> None:
        self._left = _MAX_VALUES

    def take(self, container: Any) -> Any:
        self._left -= 1 + len(container)
        if self._left < 0:
            raise WireError("", f"at most {_MAX_VALUES} values beside arrays", "more")
        return container


def _encode(obj: Any) -> Any:
    if isinstance(obj, np.ndarray):
        if obj.dtype.kind not in _KINDS:
            raise WireError("", f"an array of dtype kind in {_KINDS!r}", f"dtype {obj.dtype}")
        return {b"__ndarray__": True, b"data": obj.tobytes(), b"dtype": obj.dtype.str, b"shape": obj.shape}
    if isinstance(obj, np.generic):
        if obj.dtype.kind not in _KINDS:
            raise WireError("", f"a scalar of dtype kind in {_KINDS!r}", f"dtype {obj.dtype}")
        return {b"__npgeneric__": True, b"data": obj.item(), b"dtype": obj.dtype.str}
    if isinstance(obj, JpegImage):
        return {b"__jpeg__": True, b"data": obj.data}
    raise TypeError(f"an object of type {type(obj).__module__}.{type(obj).__name__}")


def _decode(raw: Any, path: str, level: int) -> Any:
    # Walks the tree after msgpack (its object_hook cannot tell where it is), so that an error names the field.
    if level > _MAX_LEVELS:  # msgpack itself allows more than Python's stack
        raise WireError(path[:80], f"at most {_MAX_LEVELS} levels of maps and lists", "more")
    if isinstance(raw, list):
        return [
            item if type(item) in _LEAVES else _decode(item, f"{path}[{index}]", level + 1)
            for index, item in enumerate(raw)
        ]
    if not isinstance(raw, dict):
        if isinstance(raw, (msgpack.ExtType, msgpack.Timestamp)):
            raise WireError(path, "plain msgpack types", type(raw).__name__)
        return raw
    for as_bytes, as_text, build in _BUILDERS:
        if as_bytes in raw or as_text in raw:
            return build({_text(key): value for key, value in raw.items()}, path)
    return {
        key: value if type(value) in _LEAVES else _decode(value, _under(path, key), level + 1)
        for key, value in raw.items()
    }


def _under(path: str, key: Any) -> str:
    return f"{path}.{_text(key)[:80]}" if path else _text(key)[:80]


def _array(raw: dict[str, Any], path: str) -> Any:
    dtype = _dtype(raw, path)
    shape, data = raw.get("shape"), raw.get("data")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
        raise WireError(f"{path}.shape", f"up to {_MAX_DIMS} sizes >= 0", repr(shape)[:80])
    if not isinstance(data, bytes):
        raise WireError(f"{path}.data", "bytes", type(data).__name__)
    expected = math.prod(shape) * dtype.itemsize  # Python integers: no overflow, nothing allocated yet
    # an array of no elements may still claim sizes that numpy cannot hold
    if len(data) != expected or math.prod(n for n in shape if n) * dtype.itemsize > MAX_BYTES:
        raise WireError(path, f"{expected} bytes for {dtype.str} {shape}"[:120], f"{len(data)} bytes")
    if dtype.kind == "U" and not is_text(data, dtype):
        raise WireError(path, "text of Unicode characters", f"other numbers in {dtype.str}")
    return np.frombuffer(data, dtype).reshape(shape) if expected else np.zeros(shape, dtype)


def is_text(data: bytes, dtype: "np.dtype[Any]") -> bool:
    """Are the numbers in the bytes of an array of kind U all characters? Reading others breaks the interpreter
    (SystemError), and halves of surrogate pairs cannot be written again."""
    codes = np.frombuffer(data, np.dtype("u4").newbyteorder(dtype.byteorder))
    return not ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any()


def _generic(raw: dict[str, Any], path: str) -> Any:
    dtype, value = _dtype(raw, path), raw.get("data")
    if not isinstance(value, (bool, int, float, str, bytes)):
        raise WireError(f"{path}.data", "a number or text", type(value).__name__)
    try:
        return dtype.type(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(path, f"a value of dtype {dtype.str}", repr(value)[:80]) from error


def _jpeg(raw: dict[str, Any], path: str) -> JpegImage:
    if not isinstance(raw.get("data"), bytes):
        raise WireError(f"{path}.data", "the bytes of a JPEG file", type(raw.get("data")).__name__)
    return JpegImage(raw["data"])


def _dtype(raw: dict[str, Any], path: str) -> "np.dtype[Any]":
    name = _text(raw.get("dtype"))
    try:
        # the length bound and the kind check keep numpy's mini-language of structured dtypes away
        if len(name) > 12 or name.lstrip("<>|=")[:1] not in _KINDS:
            raise TypeError(name)
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError) as error:
        raise WireError(f"{path}.dtype", f"a dtype of kind in {_KINDS!r}", name[:40] or repr(name)) from error
    if dtype.kind not in _KINDS or dtype.itemsize == 0:
        raise WireError(f"{path}.dtype", f"a dtype of kind in {_KINDS!r} with a size", name)
    return dtype


def _text(key: Any) -> str:
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)


_LEAVES = frozenset({bytes, str, int, float, bool, type(None)})
_BUILDERS = (
    (b"__ndarray__", "__ndarray__", _array),
    (b"__npgeneric__", "__npgeneric__", _generic),
    (b"__jpeg__", "__jpeg__", _jpeg),
)
