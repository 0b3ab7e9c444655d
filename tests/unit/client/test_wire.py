"""Laws of the wire codec: decoding inverts encoding, the bytes are openpi's, hostile bytes give a WireError."""

import contextlib

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recap_client.images import ImageError, JpegImage, decode_jpeg, decode_png, encode_jpeg, encode_png
from recap_client.wire import WireError, pack, unpack

DTYPES = st.one_of(
    hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes(sizes=(16, 32, 64)),
    st.sampled_from([np.dtype("<U4"), np.dtype("S3")]),
)  # fmt: skip
ARRAYS = DTYPES.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(max_size=8),
    st.binary(max_size=8),
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab/._", max_size=4), inner, max_size=3),
)


@given(ARRAYS)
@settings(deadline=None)
def test_array_round_trip(array: np.ndarray) -> None:
    back = unpack(pack({"a": array}))["a"]
    assert back.dtype == array.dtype and back.shape == array.shape
    np.testing.assert_array_equal(back, array)


@given(TREES)
@settings(deadline=None)
def test_plain_values_round_trip(tree: object) -> None:
    assert unpack(pack(tree)) == tree


@given(st.sampled_from([np.float32(0.5), np.float16(-2), np.int64(7), np.uint8(255), np.bool_(True)]))
def test_scalar_round_trip(value: np.generic) -> None:
    back = unpack(pack([value]))[0]
    assert back == value and back.dtype == value.dtype


def test_golden_bytes_of_openpi() -> None:
    data = np.array([1, -2], "<f4")
    expected = (b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x08" + data.tobytes()
                + b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x91\x02")  # fmt: skip
    assert pack(data) == expected
    generic = b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\x03\xc4\x05dtype\xa3<i8"
    assert pack(np.int64(3)) == generic


def test_openpi_client_reads_ours_and_we_read_theirs() -> None:
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    obs = {"state": np.arange(3.0), "prompt": "x", "n": np.float32(2), "img": np.zeros((2, 2, 3), np.uint8)}
    assert theirs.packb(obs) == pack(obs)
    np.testing.assert_array_equal(theirs.unpackb(pack(obs))["state"], obs["state"])


def test_str_keys_and_fortran_order_are_accepted() -> None:
    array = np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3))
    np.testing.assert_array_equal(unpack(pack(array)), array)
    body = {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": [2, 3]}
    np.testing.assert_array_equal(unpack(msgpack.packb(body)), array)


def array_map(**changes: object) -> bytes:
    body: dict[bytes, object] = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    body.update({key.encode(): value for key, value in changes.items()})
    return msgpack.packb({"obs": {"x": body}})


@pytest.mark.parametrize("changes", [
    {"dtype": "|O"}, {"dtype": "|V8"}, {"dtype": "<c8"}, {"dtype": "<M8[s]"}, {"dtype": "f4,f4"}, {"dtype": "U0"},
    {"dtype": 3}, {"dtype": None}, {"dtype": "i" * 4000}, {"dtype": "S99999999999"}, {"shape": [3]}, {"shape": [-2]},
    {"shape": [-1, -2]}, {"shape": [2**40, 2**40]}, {"shape": [0, 2**62], "data": b""}, {"shape": [1] * 40},
    {"shape": "2"}, {"shape": [2.0]}, {"shape": [True, 2]}, {"shape": None}, {"data": None},
    {"data": "text"}, {"data": b"\0" * 7}, {"data": []},
])  # fmt: skip
def test_hostile_arrays_are_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(WireError) as caught:
        unpack(array_map(**changes))
    assert caught.value.field.startswith("obs.x")
    assert "expected" in str(caught.value) and "got" in str(caught.value)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_decode_or_give_wire_error(data: bytes) -> None:
    with contextlib.suppress(WireError):
        unpack(data)


@given(st.data())
@settings(deadline=None)
def test_damaged_messages_decode_or_give_wire_error(data: st.DataObject) -> None:
    good = bytearray(pack({"type": "act", "observation": {"state": np.arange(4, dtype=np.float32), "n": np.int8(1)}}))
    good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        unpack(bytes(good))


def test_deep_nesting_and_size_limits() -> None:
    with pytest.raises(WireError):
        unpack(b"\x91" * 100_000 + b"\xc0")
    with pytest.raises(WireError, match="at most 10 bytes"):
        unpack(pack("x" * 20), max_bytes=10)
    with pytest.raises(WireError, match="binary frame"):
        unpack("text")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.array([object()]), np.array([1j]), np.complex64(1), object(), {"a": {1, 2}}])
def test_what_cannot_travel_is_refused_when_packing(value: object) -> None:
    with pytest.raises(WireError):
        pack({"x": value})


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
@settings(deadline=None)
def test_png_is_lossless_and_jpeg_keeps_the_shape(image: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_png(encode_png(image)), image)
    wired = unpack(pack(JpegImage(encode_jpeg(image))))
    assert isinstance(wired, JpegImage) and decode_jpeg(wired.data).shape == image.shape


def test_jpeg_is_close_on_a_smooth_image() -> None:
    rows, columns = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    ramp = np.stack([rows, columns, np.full((64, 64), 9)], -1).astype(np.uint8)
    assert np.abs(decode_jpeg(encode_jpeg(ramp, 95)).astype(int) - ramp).max() <= 6


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"GIF89a" + b"\0" * 50, b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_broken_images_give_image_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode_jpeg(data)


@pytest.mark.parametrize("image", [np.zeros((3, 4, 4), "u1"), np.zeros((4, 4, 3)), np.zeros((4, 4), "u1"), None])
def test_wrong_frames_are_refused_when_encoding(image: object) -> None:
    with pytest.raises(ImageError, match=r"uint8 \[H, W, 3\]"):
        encode_png(image)  # type: ignore[arg-type]


def test_arrays_are_read_only_and_outlive_the_buffer() -> None:
    numbers = np.arange(1000, dtype=np.float32)
    buffer = bytearray(pack({"x": numbers}))
    got = unpack(buffer)["x"]
    buffer[:] = bytes(len(buffer))
    assert np.array_equal(got, numbers) and not got.flags.writeable
