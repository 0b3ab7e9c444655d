"""Triton's addresses, configurations and errors as the engine reads them, and its shared memory slots."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import triton_memory
from services.common.engine import EngineError, load_engine
from services.common.triton_api import Address, Tensor, TritonError, parse_url, refusal, tensors
from services.common.triton_http import _outputs
from services.common.triton_memory import Layout, Slots

IMAGES = Tensor("images", "UINT8", (2, 4, 4, 3), (2, 4, 4, 3))
BETA = Tensor("beta", "FP32", (), (1,))


@pytest.mark.parametrize(
    "url, address",
    [
        ("grpc://triton", Address("grpc", "triton", 8001)),
        ("http://triton", Address("http", "triton", 8000)),
        ("http://[::1]:9", Address("http", "[::1]", 9)),
        ("grpc://h:7?shm=off&timeout=0.5&wait=0", Address("grpc", "h", 7, False, 0.5, 0.0)),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "triton:8001", "https://triton", "grpc://", "grpc://h:port", "grpc://h:99999", "grpc://h/models", "grpc://h?shm",
        "grpc://h?shm=maybe", "grpc://h?timeout=0", "grpc://h?timeout=nan", "grpc://h?wait=-1", "grpc://h?colour=red",
    ],
)  # fmt: skip
def test_bad_addresses_say_what_is_expected(url: str) -> None:
    with pytest.raises(EngineError, match=r"expected grpc://HOST:PORT or http://HOST:PORT, .* got '"):
        parse_url(url)


@pytest.mark.parametrize("kind", ["onnxruntime@grpc://h", "tensorflow", "@grpc://h", ""])
def test_only_triton_has_an_address(kind: str) -> None:
    with pytest.raises(EngineError, match=r"engine: expected one of \['onnxruntime', 'torch', 'triton'\]"):
        load_engine(Path("nowhere"), "policy", kind)


def test_tensors_of_a_configuration() -> None:
    """Numbers come as text from gRPC's JSON; a scalar a sample travels as [batch, 1]."""
    config = {
        "input": [
            {"name": "images", "data_type": "TYPE_UINT8", "dims": ["2", "4", "4", "3"]},
            {"name": "beta", "data_type": "TYPE_FP32", "dims": [1], "reshape": {}},
        ]
    }
    assert tensors(config, "input") == (IMAGES, BETA)
    assert tensors(config, "output") == ()
    assert (IMAGES.nbytes, BETA.nbytes) == (96, 4)


@pytest.mark.parametrize(
    "item, words",
    [
        ({"data_type": "TYPE_STRING", "dims": [1]}, r"input x: expected one of .*, got STRING"),
        ({"data_type": "TYPE_FP32", "dims": [-1]}, r"input x: expected fixed extents, got \[-1\]"),
    ],
)
def test_tensors_that_no_engine_here_has(item: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        tensors({"input": [{"name": "x", **item}]}, "input")


@pytest.mark.parametrize(
    "message, unavailable, reason",
    [
        ("Request timeout expired", True, "late"),
        ("[request id: <id_unknown>] Unable to find shared memory region: 'recap-1'", False, "memory"),
        ("Request for unknown model: 'policy' is not found", False, "absent"),
        ("Request for unknown model: 'policy' has no available versions", True, "absent"),
        ("in ensemble 'x', ValueError: boom", False, "refused"),
    ],
)
def test_what_errors_mean(message: str, unavailable: bool, reason: str) -> None:
    assert refusal(message, unavailable=unavailable).reason == reason


shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)
named = st.lists(st.tuples(st.sampled_from(["UINT8", "FP32", "BOOL", "INT32"]), shapes), min_size=1, max_size=6)


@given(named, st.integers(1, 8))
def test_tensors_in_a_slot_never_overlap(items: list[tuple[str, tuple[int, ...]]], count: int) -> None:
    parts = [Tensor(str(i), datatype, shape, shape or (1,)) for i, (datatype, shape) in enumerate(items)]
    layout = Layout.of(parts, count)
    spans = sorted((layout.offsets[t.name], layout.offsets[t.name] + count * t.nbytes) for t in parts)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[0][0] == 0 and spans[-1][1] <= layout.size
    assert all(offset % 64 == 0 for offset in layout.offsets.values())


class Server:
    """What Triton does with a registration: it opens the object by its key, or says why not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known, self.error = folder, list[str](), None

    error: TritonError | None

    def register(self, region: str, key: str, size: int, timeout_s: float) -> None:  # noqa: ARG002
        if self.error is not None:
            raise self.error
        assert (self.folder / key.lstrip("/")).stat().st_size == size
        self.known.append(region)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(triton_memory, "_FOLDER", tmp_path)
    return Server(tmp_path)


def test_slots_are_used_again_and_leave_no_name(server: Server) -> None:
    slots = Slots(4096, server.register, pytest.fail)
    first, second = slots.take(1.0), slots.take(1.0)
    assert first is not None and second is not None and first is not second
    slots.give(first)
    assert slots.take(1.0) is first
    assert server.known == [first.name, second.name] and set(slots.names()) == set(server.known)
    assert list(server.folder.iterdir()) == []


def test_what_is_put_into_a_slot_comes_out(server: Server) -> None:
    layout = Layout.of((IMAGES, BETA), 3)
    slot = Slots(layout.size, server.register, pytest.fail).take(1.0)
    assert slot is not None
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 4, 3), np.uint8)
    beta = np.array([1.5, 2.0, 2.5], np.float32)
    for tensor, array in ((IMAGES, images), (BETA, beta)):
        part = slot.put(tensor, array, layout.offsets[tensor.name])
        assert (part.shape, part.nbytes, part.region) == ([3, *tensor.wire], array.nbytes, slot.name)
    for tensor, array in ((IMAGES, images), (BETA, beta)):
        assert slot.get(tensor, 3, layout.offsets[tensor.name]) == array.tobytes()


def test_a_slot_without_an_answer_is_not_used_again_soon(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(64, server.register, pytest.fail)
    late = slots.take(1.0)
    assert late is not None
    slots.set_aside(late)
    assert slots.take(1.0) is not late
    monkeypatch.setattr(triton_memory, "_QUARANTINE_S", -1.0)
    assert slots.take(1.0) is late


def test_slots_end_and_tensors_are_sent(server: Server) -> None:
    slots = Slots(64, server.register, pytest.fail)
    taken = [slots.take(1.0) for _ in range(20)]
    assert [slot is None for slot in taken] == [False] * 16 + [True] * 4


def test_refusal_holds_until_the_server_was_away(server: Server) -> None:
    told: list[str] = []
    slots = Slots(64, server.register, told.append)
    server.error = TritonError("refused", "Unable to open shared memory region")
    assert slots.take(1.0) is None and slots.take(1.0) is None
    assert told == ["Unable to open shared memory region"]
    server.error = TritonError("unreachable", "connection refused")
    slots.reset()
    with pytest.raises(TritonError, match="connection refused"):
        slots.take(1.0)
    server.error = None
    old = slots.take(1.0)
    assert old is not None
    slots.reset()
    slots.give(old)  # of before: Triton does not know it any more
    assert slots.take(1.0) is not old
    assert list(server.folder.iterdir()) == []


def test_no_room_is_no_error(server: Server) -> None:
    told: list[str] = []
    assert Slots(1 << 62, server.register, told.append).take(1.0) is None
    assert len(told) == 1 and list(server.folder.iterdir()) == []


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-5, 300).map(str), st.text(max_size=5)))
def test_hostile_answers_are_refused(body: bytes, length: str | None) -> None:
    headers = {} if length is None else {"Inference-Header-Content-Length": length}
    try:
        found = _outputs(headers, body)
    except TritonError as error:
        reason = error.reason
    else:
        reason = "refused" if all(isinstance(name, str) for name in found) else "wrong"
    assert reason == "refused"
