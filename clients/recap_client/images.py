"""JPEG for camera frames on the wire, PNG or JPEG in the rollout log. Frames are uint8 [H, W, 3] RGB everywhere."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_PIXELS = 4096 * 4096
"""Largest frame that is decoded; a small file may claim a huge size."""


class ImageError(ValueError):
    """Bytes are not the image they should be, or a frame is not uint8 [H, W, 3]."""


@dataclass(frozen=True)
class JpegImage:
    """A JPEG file as bytes, travelling in place of an array; `decode_jpeg(image.data)` gives the frame."""

    data: bytes


def encode_jpeg(image: NDArray[np.uint8], quality: int = 90) -> bytes:
    """uint8 [H, W, 3] -> JPEG file (lossy; 4:4:4 at quality >= 90). Raises ImageError on another shape or dtype."""
    return _encode(image, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)


def decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    """JPEG file -> uint8 [H, W, 3]. Raises ImageError on anything else, before pixels are allocated."""
    return _decode(data, "JPEG")


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Height and width by the header of a JPEG file; nothing is decoded. Raises ImageError."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return image.height, image.width
    except Exception as error:  # as in `_decode`; a size beyond reason is an error of Pillow's own
        raise ImageError(f"expected a JPEG image, got {len(data)} bytes that do not decode ({error})") from error


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, 3] -> PNG file (lossless)."""
    return _encode(image, "PNG", compress_level=1)


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """PNG file -> uint8 [H, W, 3], equal to what `encode_png` was given."""
    return _decode(data, "PNG")


def _encode(image: NDArray[np.uint8], form: str, **options: Any) -> bytes:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"image to encode as {form}: expected uint8 [H, W, 3], got {got}")
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(stream, form, **options)
    return stream.getvalue()


def _decode(data: bytes, form: str) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=[form]) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"{form} image: expected at most {MAX_PIXELS} pixels, got {width} x {height}")
            return np.asarray(image.convert("RGB"), np.uint8)
    except ImageError:
        raise
    except Exception as error:  # Pillow raises many kinds (SyntaxError, struct.error, ...) on hostile bytes
        raise ImageError(f"expected a {form} image, got {len(data)} bytes that do not decode ({error})") from error
