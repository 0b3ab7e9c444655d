"""A chunk of actions as LeRobot's server pickles it, `pickle.dumps(list[TimedAction])` of tensors, without torch.

The opcodes are those that Python and torch emit, in their order, because clients in other languages read just these.
Each action carries a storage of its own; LeRobot's server repeats the whole chunk's storage in every action.
"""

import struct

import numpy as np
from numpy.typing import NDArray

# torch's storage format before zip files: magic number, version, sizes of C types
_STORAGE = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    b"\x80\x02}q\x00(X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00little_endianq\x02\x88"
    b"X\n\x00\x00\x00type_sizesq\x03}q\x04(X\x05\x00\x00\x00shortq\x05K\x02X\x03\x00\x00\x00intq\x06K\x04"
    b"X\x04\x00\x00\x00longq\x07K\x04uu."
)
_KEY = b"X\x0e\x00\x00\x0094000000000000"  # the storage's address in the sender; means nothing to the receiver
_NEXT = b"h\x03)\x81\x94}\x94(h\x06"  # a further TimedAction; 3, 6, ... are memo entries that the first one fills


def write_actions(actions: NDArray[np.float32], module: str, timestamp: float, timestep: int, period: float) -> bytes:
    """A pickle of one `TimedAction` for every row of actions [T, A], T > 0.

    module: where the client has the class. timestamp, timestep: those of the observation; they go up by `period`
    seconds and by one with every row.
    """
    parts = [b"]\x94("]
    for index, action in enumerate(actions):
        first = index == 0
        head = _global(module, "TimedAction") + b")\x81\x94}\x94(" + _text("timestamp") if first else _NEXT
        parts += [
            head,
            b"G" + struct.pack(">d", timestamp + index * period),
            _text("timestep") if first else b"h\x07",
            _whole(timestep + index),
            _text("action") if first else b"h\x08",
            _tensor(action, first),
            b"ub",
        ]
    body = b"".join(parts) + b"e."
    return b"\x80\x04\x95" + len(body).to_bytes(8, "little") + body


def _tensor(action: NDArray[np.float32], first: bool) -> bytes:
    size = _whole(len(action))
    return b"".join(
        (
            _global("torch._utils", "_rebuild_tensor_v2") if first else b"h\x0b",
            b"(",
            _global("torch.storage", "_load_from_bytes") if first else b"h\x0e",
            _octets(_storage(action)),
            b"\x94\x85\x94R\x94K\x00",  # the storage, and where in it the tensor starts
            size + b"\x85\x94K\x01\x85\x94\x89",  # shape, stride, no gradient
            _global("collections", "OrderedDict") if first else b"h\x16",  # no hooks
            b")R\x94t\x94R\x94",
        )
    )


def _storage(action: NDArray[np.float32]) -> bytes:
    kind = b"\x80\x02(X\x07\x00\x00\x00storageq\x00ctorch\nFloatStorage\nq\x01"
    described = kind + _KEY + b"q\x02X\x03\x00\x00\x00cpuq\x03" + _whole(len(action)) + b"Ntq\x04Q."
    keys = b"\x80\x02]q\x00" + _KEY + b"q\x01a."
    return _STORAGE + described + keys + len(action).to_bytes(8, "little") + action.astype("<f4").tobytes()


def _global(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93\x94"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"\x8c" + bytes([len(data)]) + data + b"\x94"


def _octets(data: bytes) -> bytes:
    return b"B" + len(data).to_bytes(4, "little") + data


def _whole(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + bytes([value])
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
