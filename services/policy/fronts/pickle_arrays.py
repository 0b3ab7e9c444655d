"""The parts of a pickled numpy array, as data: what `numpy` would be called with, checked before an array is made."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.common.errors import ServiceError

_KINDS = "biuf"
_MAX_DIMS = 8


@dataclass(frozen=True)
class Global:
    """A name that the pickle would import. Only compared, never looked up."""

    module: str
    name: str


@dataclass
class Dtype:
    """code: as numpy writes it without the byte order, e.g. `u1`."""

    code: str
    order: str = "="

    def build(self, state: Any) -> None:
        """Take the state that follows the name: (version, byte order, ...)."""
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise refuse("a dtype of unknown byte order")
        self.order = state[1]


@dataclass
class Array:
    """An array whose contents come after it; `value` is what takes its place."""

    value: Any = None

    def build(self, state: Any) -> None:
        """Take the contents: (version, shape, dtype, whether in Fortran order, bytes)."""
        if type(state) is not tuple or len(state) != 5:
            raise refuse("an array without its contents")
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran is True else "C")


def refuse(why: str) -> ServiceError:
    """The error for a pickle that is not data of ours."""
    return ServiceError("bad_message", why)


def call(function: Any, arguments: Any) -> Any:
    """What a REDUCE stands for; no function of that name is called."""
    known = CALLS.get((function.module, function.name)) if isinstance(function, Global) else None
    if known is None or type(arguments) is not tuple:
        raise refuse("a call of something else than an array's parts")
    build, arity = known
    if len(arguments) != arity:
        raise refuse(f"a part of an array with {len(arguments)} arguments instead of {arity}")
    return build(*arguments)


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> Any:
    kind = _numpy_dtype(dtype)
    if type(shape) is not tuple or len(shape) > _MAX_DIMS or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise refuse("an array of no shape")
    if not isinstance(data, memoryview) or order not in ("C", "F"):
        raise refuse("an array without its bytes")
    size = math.prod(shape) * kind.itemsize  # Python integers: no overflow, nothing allocated yet
    if size != len(data):
        raise refuse(f"{len(data)} bytes for an array of {size}")
    return np.frombuffer(data, kind).reshape(shape, order=order)


def _numpy_dtype(dtype: Any) -> "np.dtype[Any]":
    if not isinstance(dtype, Dtype):
        raise refuse("an array without a dtype")
    code = dtype.code
    if not (1 < len(code) < 4 and code[0] in _KINDS and code[1:].isascii() and code[1:].isdigit()):
        raise refuse(f"an array of dtype {code[:20]!r}")
    try:
        return np.dtype(dtype.order + code)
    except TypeError:
        raise refuse(f"an array of dtype {code!r}") from None


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (1,), "C")[0].item()


def _empty(kind: Any, shape: Any, code: Any) -> Array:
    if kind != Global("numpy", "ndarray"):
        raise refuse("an array of another class than numpy.ndarray")
    del shape, code  # always (0,) and b"b"; the real ones come by BUILD
    return Array()


def _dtype(code: Any, align: Any, copy: Any) -> Dtype:
    del align, copy
    if type(code) is not str:
        raise refuse("a dtype that is not text")
    return Dtype(code)


CALLS: dict[tuple[str, str], tuple[Callable[..., Any], int]] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): (_empty, 3) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): (_scalar, 2) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): (_array, 4) for core in ("core", "_core")},
    ("numpy", "dtype"): (_dtype, 3),
}
"""What numpy 1 and 2 write for arrays and scalars -> our reading of it, and its number of arguments."""
