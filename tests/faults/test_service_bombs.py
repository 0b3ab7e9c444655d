"""Small messages that claim to be huge: refused before the memory for them exists, at every front's decoder."""

import base64
import io
import json
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from PIL import Image

from recap_client import wire
from recap_client.images import ImageError, JpegImage, decode_jpeg, decode_png, jpeg_size
from recap_model.observation import ObservationError
from repository_factory import robot_spec
from service_harness import NativeClient, act, fetch, policy_server
from services.common import json_numpy
from services.common.errors import ServiceError
from services.common.json_body import parse_object
from services.common.observation import _decode
from services.common.settings import limits_for
from services.policy.fronts import groot_codec, pickle_data

SPEC = robot_spec()
LIMITS = limits_for(SPEC)
MEBIBYTE = 1 << 20


def jpeg_claiming(height: int, width: int) -> bytes:
    """Tables and a frame header, and then nothing: decoding it fails, which a refusal by its size does not get to."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    data = bytearray(stream.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    scan = data.index(b"\xff\xda") + 2
    return bytes(data[: scan + int.from_bytes(data[scan : scan + 2])])


def png_claiming(height: int, width: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(MEBIBYTE)))


def peak(call: Callable[[], Any]) -> int:
    """Most bytes that `call` held at once, whatever it raised (which must be one of our own errors)."""
    tracemalloc.start()
    try:
        with pytest.raises((ServiceError, wire.WireError, ImageError, ObservationError)):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def array(shape: list[int], dtype: str = "<f4") -> dict[bytes, Any]:
    """As both encodings write one."""
    return {b"__ndarray__": True, b"nd": True, b"data": b"", b"dtype": dtype, b"type": dtype, b"shape": shape}


def many(item: bytes, count: int = 1 << 23) -> bytes:
    """Lists of 4096 of an item in lists of 4096, `count` bytes long and cut off there."""
    full = b"\xdc\x10\x00" + item * 4096
    return (b"\xdc\x10\x00" + full * (count // len(full) + 1))[:count]


WIRE = {
    "10^12 numbers": msgpack.packb({"x": array([10**6, 10**6])}),
    "an overflow": msgpack.packb({"x": array([2**32, 2**32, 2**32])}),
    "no elements, and sizes that numpy cannot hold": msgpack.packb({"x": array([0] + [2**26] * 7)}),
    "one element of 100 MB": msgpack.packb({"x": array([1], "<U25000000")}),
    "millions of empty maps": many(b"\x80"),
    "millions of empty lists": many(b"\x90"),
    "millions of short texts": many(b"\xa2ab"),
    "millions of maps of one": many(b"\x81\xa1a\xc0"),
    "a thousand lists that are announced": b"\xdc\x10\x00" * 1000,
    "a thousand maps that are announced": b"\xde\x10\x00\xa1a" * 1000,
}


@pytest.mark.parametrize("name", WIRE)
@pytest.mark.parametrize("unpack", [lambda data: wire.unpack(data), lambda data: groot_codec.unpack(data, 1 << 24)])
def test_msgpack_that_claims_much_costs_little(name: str, unpack: Callable[[bytes], Any]) -> None:
    data = WIRE[name]
    assert peak(lambda: unpack(data)) < 48 * MEBIBYTE
    began = time.process_time()
    with pytest.raises((ServiceError, wire.WireError)):
        unpack(data)
    assert time.process_time() - began < 2.0


def test_a_npy_file_that_claims_much_costs_little() -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }\n"
    file = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    data = msgpack.packb({"data": {"__ndarray_class__": True, "as_npy": file}})
    assert peak(lambda: groot_codec.unpack(data, 1 << 20)) < MEBIBYTE


BODIES = {
    "millions of empty lists": b'{"state": [' + b"[]," * 3_000_000 + b"[]]}",
    "millions of empty maps": b'{"state": [' + b"{}," * 3_000_000 + b"{}]}",
    "deep": b'{"state": ' + b"[" * 5_000_000,
    "millions of short texts": b'{"state": [' + b'"ab",' * 2_000_000 + b'""]}',
    "millions of keys": b"{" + b'"ab":1,' * 1_500_000 + b'"":1}',
    "the same inside a text": json.dumps({"encoded": "[" + "[]," * 1_000_000 + "[]]"}).encode(),
}


@pytest.mark.parametrize("name", BODIES)
def test_json_that_claims_much_costs_little(name: str) -> None:
    assert peak(lambda: parse_object(BODIES[name], LIMITS)) < MEBIBYTE


def test_whole_frames_as_nested_lists_are_still_taken() -> None:
    frames = {c.name: np.full((c.height, c.width, 3), 255).tolist() for c in SPEC.cameras}
    text = json.dumps({"images": frames, "state": [0.1] * len(SPEC.state), "instruction": "open, [and] {close}"})
    assert parse_object(text, LIMITS)["images"] == frames
    assert parse_object(text.encode(), LIMITS)["images"] == frames


def test_an_envelope_that_claims_much_costs_little() -> None:
    for shape, dtype in (([10**6, 10**6], "<f8"), ([2**31] * 8, "|u1"), ([1], "<U9999999")):
        envelope = {"state": {"__numpy__": base64.b64encode(b"1234").decode(), "dtype": dtype, "shape": shape}}
        assert peak(lambda envelope=envelope: json_numpy.decode(envelope)) < MEBIBYTE


def test_pickles_that_claim_much_cost_little() -> None:
    claims = (
        b"\x8e" + struct.pack("<Q", 2**60),
        b"B" + struct.pack("<I", 2**32 - 1),
        b"\x8a\xff",
        b"r\xff\xff\xff\xff",
    )
    for claim in (*claims, b"]" * 30_000, b"(" * 10_000_000):
        data = b"\x80\x04" + claim
        assert peak(lambda data=data: pickle_data.read(data, "observation", [])) < 8 * MEBIBYTE


def test_an_image_of_another_size_is_never_decoded() -> None:
    camera = SPEC.cameras[0]
    for height, width in ((4096, 4096), (16, 17)):
        data = jpeg_claiming(height, width)
        assert jpeg_size(data) == (height, width)
        with pytest.raises(ObservationError, match=rf"a JPEG of \[{height}, {width}\]"):
            _decode(data, camera)
        assert peak(lambda data=data: _decode(data, camera)) < MEBIBYTE
    with pytest.raises(ImageError, match=r"exceeds limit of|60000 x 60000"):
        _decode(jpeg_claiming(60_000, 60_000), camera)
    for decode, data in ((decode_jpeg, jpeg_claiming(60_000, 60_000)), (decode_png, png_claiming(60_000, 60_000))):
        assert peak(lambda decode=decode, data=data: decode(data)) < MEBIBYTE
    padded = jpeg_claiming(16, 16) + bytes(1 << 17)  # room for thousands of scans of nothing
    with pytest.raises(ObservationError, match="a JPEG of at most 66304 bytes, got 131"):
        _decode(padded, camera)


def test_the_service_names_the_bomb_and_serves_on(models: Path) -> None:
    with policy_server(models) as served, NativeClient(served.url()) as client:
        body = act(SPEC)
        body["observation"]["images"]["front"] = JpegImage(jpeg_claiming(4096, 4096))
        reply = client.ask(body)
        assert (reply["code"], reply["field"], reply["got"]) == (
            "bad_observation", "images[front]", "a JPEG of [4096, 4096]",
        )  # fmt: skip
        client.socket.send(WIRE["millions of empty maps"][: served.service.limits.message])
        assert client.receive()["code"] == "bad_message"
        code, text = fetch(served.http("/act"), data=BODIES["millions of empty lists"])
        assert code == 413 and json.loads(text)["error"]["code"] == "too_large"
        assert client.ask(act(SPEC))["type"] == "chunk"
