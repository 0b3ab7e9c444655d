"""One observation as a file and as openpi's msgpack message; the decoding that every handler here does."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray
from PIL import Image

CHUNK, ACTIONS = 50, 14  # of every server's reply: openpi's and LeRobot's usual chunk, a two-armed robot


@dataclass(frozen=True)
class Sample:
    """state float32 [S]; images: camera -> uint8 [H, W, 3], or the bytes of a JPEG file."""

    state: NDArray[np.float32]
    images: dict[str, NDArray[np.uint8] | bytes]
    prompt: str


def save(sample: Sample, path: Path) -> None:
    frames: dict[str, Any] = {}
    for name, frame in sample.images.items():
        kind = "jpeg" if isinstance(frame, bytes) else "raw"
        frames[f"{kind}:{name}"] = np.frombuffer(frame, np.uint8) if isinstance(frame, bytes) else frame
    np.savez(path, state=sample.state, prompt=np.asarray(sample.prompt), **frames)


def load(path: Path) -> Sample:
    """Inverse of `save`."""
    images: dict[str, Any] = {}
    with np.load(path) as data:
        for key in data.files:
            kind, _, name = key.partition(":")
            if kind in ("raw", "jpeg"):
                images[name] = data[key].tobytes() if kind == "jpeg" else data[key]
        return Sample(data["state"], images, str(data["prompt"]))


def message(sample: Sample) -> bytes:
    """As `openpi-client` sends it; JPEG frames as `recap_client.wire` writes them."""
    images = {
        name: {b"__jpeg__": True, b"data": frame} if isinstance(frame, bytes) else frame
        for name, frame in sample.images.items()
    }
    return encode({"state": sample.state, "images": images, "prompt": sample.prompt})


def encode(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, default=_pack)
    return packed


def decode(data: bytes) -> Any:
    """Arrays as views, JPEG frames as arrays."""
    return msgpack.unpackb(data, object_hook=_unpack)


def constant_actions() -> NDArray[np.float32]:
    return np.zeros((CHUNK, ACTIONS), np.float32)


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(f"cannot encode {type(value).__name__}")


def _unpack(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return np.ndarray(value[b"shape"], np.dtype(value[b"dtype"]), value[b"data"])
    if b"__jpeg__" in value:
        return np.asarray(Image.open(io.BytesIO(value[b"data"])).convert("RGB"))
    return value
