"""The json-numpy envelope of OpenVLA's clients, as a codec (their library patches the json module instead)."""

import base64
import binascii
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.errors import bad_field

_KINDS = "biuf"


def encode(array: NDArray[Any]) -> dict[str, Any]:
    """`{"__numpy__": base64 of the C-order bytes, "dtype": "<f4", "shape": [...]}`."""
    data = np.ascontiguousarray(array)
    return {"__numpy__": base64.b64encode(data.tobytes()).decode(), "dtype": data.dtype.str, "shape": list(data.shape)}


def decode(value: Any, path: str = "") -> Any:
    """Replace every envelope in parsed JSON by its array (read-only). Raises ServiceError naming the path."""
    if isinstance(value, list):
        return [decode(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "__numpy__" in value:
        return _array(value, path)
    return {key: decode(item, f"{path}.{key}" if path else key) for key, item in value.items()}


def contains(value: Any) -> bool:
    """Is there an envelope anywhere in this parsed JSON?"""
    if isinstance(value, dict):
        return "__numpy__" in value or any(map(contains, value.values()))
    return isinstance(value, list) and any(map(contains, value))


def _array(value: dict[str, Any], path: str) -> NDArray[Any]:
    shape, name = value.get("shape"), value.get("dtype")
    try:
        if not isinstance(name, str) or len(name) > 12:
            raise TypeError(name)
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError) as error:
        raise bad_field("bad_message", f"{path}.dtype", "a numpy dtype such as |u1", repr(name)[:40]) from error
    if dtype.kind not in _KINDS:
        raise bad_field("bad_message", f"{path}.dtype", f"a dtype of kind in {_KINDS!r}", repr(name))
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise bad_field("bad_message", f"{path}.shape", "up to 8 sizes >= 0", repr(shape)[:80])
    try:
        data = base64.b64decode(value["__numpy__"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise bad_field("bad_message", f"{path}.__numpy__", "base64 text", str(error)) from error
    if len(data) != math.prod(shape) * dtype.itemsize or not data:
        raise bad_field(
            "bad_message",
            path,
            f"{math.prod(shape) * dtype.itemsize} bytes for {name} {shape}"[:120],
            f"{len(data)} bytes",
        )
    return np.frombuffer(data, dtype).reshape(shape)
