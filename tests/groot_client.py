"""GR00T's clients as their documentation writes them: the encodings of N1.5/N1.6 and N1.7 over a REQ socket."""

import io
from typing import Any

import msgpack
import numpy as np
import zmq


def npy(array: np.ndarray) -> dict[str, Any]:
    """N1.5 and N1.6."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def nd(array: np.ndarray) -> dict[bytes, Any]:
    """N1.7: PyPI's msgpack-numpy."""
    return {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}


def decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "__ndarray_class__" in value:
        return np.load(io.BytesIO(value["as_npy"]), allow_pickle=False)
    if b"nd" in value:
        return np.frombuffer(value[b"data"], value[b"type"]).reshape(value[b"shape"])
    return {key: decoded(item) for key, item in value.items()}


class GrootClient:
    """A REQ socket of its own."""

    def __init__(self, port: int, encode: Any = npy) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.REQ)
        self.socket.set(zmq.RCVTIMEO, 20_000)
        self.socket.set(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self._encode = encode

    def __enter__(self) -> "GrootClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()

    def raw(self, data: bytes) -> bytes:
        self.socket.send(data)
        return self.socket.recv()

    def send(self, request: Any) -> None:
        self.socket.send(msgpack.packb(request, default=self._encode))

    def call(self, endpoint: str | None, data: Any = None, **more: Any) -> Any:
        request = more if endpoint is None else {"endpoint": endpoint, **more}
        self.send(request if data is None else request | {"data": data})
        return decoded(msgpack.unpackb(self.socket.recv()))
