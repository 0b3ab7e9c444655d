"""LeRobot's pickles, read as data and written without torch: all but what robots send is refused, unexecuted."""

import asyncio
import io
import pickle
import pickletools
import struct
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lerobot_pickles import MODULE, RemotePolicyConfig, TimedObservation, lerobot_pickle
from repository_factory import robot_spec
from services.common.errors import ServiceError
from services.policy.fronts.lerobot_messages import (
    BEGIN,
    END,
    MIDDLE,
    MODULES,
    Setup,
    read_fields,
    read_setup,
    read_timed_observation,
    receive_chunks,
    write_bytes,
)
from services.policy.fronts.pickle_actions import write_actions
from services.policy.fronts.pickle_data import MAX_OPERATIONS, Record, read

SPEC = robot_spec()
CLASSES = [(module, "TimedObservation") for module in MODULES]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
        | st.tuples(inner, inner)
        | st.tuples(inner)
    ),
    max_leaves=12,
)


def refused(data: bytes) -> str:
    with pytest.raises(ServiceError) as error:
        read(data, "observation", CLASSES)
    assert error.value.fault.code == "bad_message" and error.value.fault.field == "observation"
    return error.value.fault.message


@given(value=PLAIN, protocol=st.sampled_from([3, 4, 5]))
def test_plain_values_come_back(value: Any, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol=protocol), "x", CLASSES) == value


@given(
    code=st.sampled_from(["|u1", "<f4", ">f4", "<f8", "<i8", "|b1", "<u2"]),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    order=st.sampled_from("CF"),
    protocol=st.sampled_from([3, 4, 5]),
)
def test_arrays_come_back(code: str, shape: list[int], order: Any, protocol: int) -> None:
    array = np.asarray(np.random.default_rng(0).integers(0, 2, shape), dtype=code, order=order)
    back = read(pickle.dumps({"a": array, "b": array, "c": array.flat[0]}, protocol=protocol), "x", CLASSES)
    for name in ("a", "b"):
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype and not back[name].flags.writeable
    assert back["c"] == array.flat[0]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_the_classes_of_every_version_become_records(module: str, protocol: int) -> None:
    data = lerobot_pickle(TimedObservation(1.5, 3, {"x": 1.0}, True), protocol, module)
    fields = {"timestamp": 1.5, "timestep": 3, "observation": {"x": 1.0}, "must_go": True}
    assert read(data, "x", CLASSES) == Record(module, "TimedObservation", fields)


@given(data=st.binary(max_size=200) | st.binary(max_size=200).map(lambda tail: b"\x80\x04" + tail))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        read(data, "x", CLASSES)
    except ServiceError as error:
        assert error.fault.code == "bad_message"  # noqa: PT017 - hypothesis runs this many times


@given(data=st.data())
def test_a_damaged_observation_is_read_or_refused(data: Any) -> None:
    good = bytearray(lerobot_pickle(TimedObservation(1.0, 0, {"x": 1.0, "f": np.zeros((2, 2), np.uint8)})))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_timed_observation(bytes(good), Setup(), SPEC)
    except (ServiceError, ValueError) as error:
        assert "observation" in str(error) or "timest" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "1 bytes announced and 0 there"),
        (b"\x80\x04", "1 bytes announced"),
        (b"cos\nsystem\n.", "the global os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "the global builtins.eval"),
        (b"cnumpy\ndtype\n.", "a global as a value"),
        (b"cnumpy\ndtype\n)R.", "0 arguments instead of 3"),
        (b"cnumpy\nndarray\n)R.", "a call of something else"),
        (b"cnumpy\nndarray\n)\x81.", "an instance of something else"),
        (f"c{MODULE}\nTimedObservation\n)R.".encode(), "a call of something else"),
        (f"c{MODULE}\nTimedObservation\n}}b.".encode(), "a state for a Global"),
        (f"c{MODULE}\nTimedObservation\n)".encode() + b"\x81K\x01b.", "a state for a Record"),
        (f"c{MODULE}.evil\nTimedObservation\n.".encode(), "the global"),
        (b"r\xff\xff\xff\xff.", "an opcode without its operand"),
        (b"Nr\xff\xff\xff\xff0.", "opcode 0x30"),
        (b"j\xff\xff\xff\xff.", "memo 4294967295, which was never filled"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "bytes announced and 1 there"),
        (b"B\xff\xff\xff\x7fx.", "bytes announced"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.", "bytes announced"),
        (b"X\x02\x00\x00\x00\xff\xff.", "text that is not UTF-8"),
        (b"i0\n.", "opcode 0x69"),
        (b"P1\n.", "opcode 0x50"),
        (b"Q.", "opcode 0x51"),
        (b"\x82\x01.", "opcode 0x82"),
        (b"t.", "an opcode without its mark"),
        (b"(.", "an opcode without its operand"),
        (b"K\x01N\x85s.", "opcode without its operand"),
        (b"}K\x01Ns.", "keys that are not text"),
        (b"}(X\x01\x00\x00\x00au.", "keys that are not text"),
        (b"K\x01(Ne.", "a list opcode on a int"),
        (b"c" + b"a" * 300, "a name without an end"),
        (b"N" * (MAX_OPERATIONS + 1), f"more than {MAX_OPERATIONS} opcodes"),
    ],
)
def test_what_no_client_sends_is_refused_and_named(data: bytes, why: str) -> None:
    message = refused(data)
    assert why in message and message.endswith("nothing of it was executed"), message


@pytest.mark.parametrize(
    "code, shape, size, why",
    [
        (b"O8", b"K\x01\x85", 8, "dtype 'O8'"),
        (b"V8", b"K\x01\x85", 8, "dtype 'V8'"),
        (b"u3", b"K\x01\x85", 3, "dtype 'u3'"),
        (b"u1", b"\x8a\x08" + b"\xff" * 7 + b"\x3f\x85", 4, "an array of no shape"),
        (b"u1", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", 4, "4 bytes for an array of 4611686014132420609"),
        (b"u1", b"K\x00\x85", 0, "an array of no shape"),
        (b"u1", b"(" + b"K\x01" * 9 + b"t", 1, "an array of no shape"),
        (b"f4", b"K\x02\x85", 7, "7 bytes for an array of 8"),
    ],
)
def test_an_array_is_held_against_its_bytes_before_it_is_made(code: bytes, shape: bytes, size: int, why: str) -> None:
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00" + code + b"\x89\x88\x87R"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    state = b"(K\x01" + shape + dtype + b"\x89B" + struct.pack("<I", size) + bytes(size) + b"tb."
    assert why in refused(empty + state)


def test_a_shared_value_is_not_copied_by_every_mention() -> None:
    data = {"a": bytes(10_000)}
    many = read(pickle.dumps({str(i): data["a"] for i in range(500)}), "x", CLASSES)
    assert len({id(value) for value in many.values()}) == 1


@settings(max_examples=20)
@given(rows=st.integers(1, 12), size=st.integers(1, 300), first=st.integers(0, 2**62), module=st.sampled_from(MODULES))
def test_replies_are_well_formed_pickles_of_known_parts(rows: int, size: int, first: int, module: str) -> None:
    reply = write_actions(np.zeros((rows, size), np.float32), module, 2.0, first, 0.05)
    names = [(code.name, value) for code, value, _ in pickletools.genops(reply)]
    assert names[0] == ("PROTO", 4) and names[-1] == ("STOP", None)
    assert names[1] == ("FRAME", len(reply) - 11)
    assert sum(name == "NEWOBJ" for name, _ in names) == rows and ("SHORT_BINUNICODE", module) in names
    pickletools.dis(reply, out=io.StringIO())  # raises on a stack or memo that does not add up


def test_a_setup_is_read() -> None:
    features = {
        "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]},
        "observation.images.front": {"dtype": "image", "shape": (16, 16, 3), "names": ["h", "w", "c"]},
        "observation.images.up": {"dtype": "image", "shape": (16, 16, 3), "names": ["h", "w", "c"]},
    }
    rename = {"observation.images.up": "observation.images.top"}
    config = RemotePolicyConfig("act", "somewhere/else", features, 5, rename_map=rename)
    assert read_setup(write_bytes(1, lerobot_pickle(config)), SPEC) == Setup(MODULE, 5, {"up": "top"})
    for change in (
        {"lerobot_features": None},
        {"lerobot_features": {}},
        {"lerobot_features": {"observation.state": 3}},
        {"actions_per_chunk": 0},
        {"actions_per_chunk": True},
        {"rename_map": {"a": 3}},
        {"rename_map": {}},
    ):
        bad = RemotePolicyConfig(**(config.__dict__ | change))
        with pytest.raises(ServiceError):
            read_setup(write_bytes(1, lerobot_pickle(bad)), SPEC)


@pytest.mark.parametrize(
    "seen, field",
    [
        (TimedObservation(float("nan"), 0, {}), "timestamp"),
        (TimedObservation("now", 0, {}), "timestamp"),  # type: ignore[arg-type]
        (TimedObservation(0.0, -1, {}), "timestep"),
        (TimedObservation(0.0, 2**63, {}), "timestep"),
        (TimedObservation(0.0, 0, [1]), "observation"),
        (TimedObservation(0.0, 0, {}), "state[x]"),
        (TimedObservation(0.0, 0, {"x": 10**400}), "state[x]"),
        (RemotePolicyConfig("", "", {}, 1), "observation"),
        ([1], "observation"),
    ],
)
def test_an_observation_without_its_parts_is_refused(seen: Any, field: str) -> None:
    with pytest.raises((ServiceError, ValueError), match="expected") as error:
        read_timed_observation(lerobot_pickle(seen), Setup(), SPEC)
    fault = getattr(error.value, "fault", error.value)
    assert fault.field == field


@given(number=st.integers(1, 15), data=st.binary(min_size=1, max_size=300))
def test_protobuf_fields_come_back(number: int, data: bytes) -> None:
    assert read_fields(b"\x78\x96\x01" + write_bytes(number, data) if number != 15 else write_bytes(number, data))[
        number
    ] == memoryview(data)


@given(data=st.binary(max_size=60))
def test_any_protobuf_is_read_or_refused(data: bytes) -> None:
    try:
        fields = read_fields(data)
    except ServiceError as error:
        assert error.fault.code == "bad_message"  # noqa: PT017
    else:
        assert sum(len(value) for value in fields.values() if isinstance(value, memoryview)) <= len(data)


@pytest.mark.parametrize("piece", [b"\x08\x02", b"\x08\x02\x12\x01a", b"\x08\x02\x1a\xff\x01" + bytes(255)])
def test_a_transfer_of_small_or_padded_pieces_is_bounded_too(piece: bytes) -> None:
    sent = []

    async def pieces() -> AsyncIterator[bytes]:
        while len(sent) < 100_000:
            sent.append(1)
            yield piece

    with pytest.raises(ServiceError, match="at most 1048576 bytes"):
        asyncio.run(receive_chunks(pieces(), 1 << 20))
    assert len(sent) <= 1 + (1 << 20) / 256


def test_the_states_of_a_transfer_are_lerobots() -> None:
    assert (BEGIN, MIDDLE, END) == (1, 2, 3) and write_bytes(1, b"") == b""
