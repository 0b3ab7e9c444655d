"""Bad input to the policy service: a typed error that names the part, and the next request is served."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from recap_client import wire
from recap_client.images import JpegImage
from repository_factory import TASKS, robot_spec
from service_harness import NativeClient, Served, act, observation, policy_server

SPEC = robot_spec()


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with policy_server(models) as server:
        yield server


def seen(**change: Any) -> dict[str, Any]:
    return {"observation": {key: value for key, value in (observation(SPEC) | change).items() if value is not None}}


def images(**change: Any) -> dict[str, Any]:
    frames = observation(SPEC)["images"] | change
    return seen(images={key: value for key, value in frames.items() if value is not None})


@pytest.mark.parametrize(
    "parts, code, field, words",
    [
        (
            images(front=np.zeros((8, 16, 3), np.uint8)),
            "bad_observation",
            "images[front]",
            ["[16, 16, 3]", "[8, 16, 3]"],
        ),
        (images(front=np.zeros((16, 16, 3), np.float32)), "bad_observation", "images[front]", ["uint8", "float32"]),
        (images(top=None), "bad_observation", "images[top]", ["no such camera", "front"]),
        (images(front=JpegImage(b"\xff\xd8\xff no image")), "bad_observation", "images", ["JPEG"]),
        (images(front=[[1, 2], [3]]), "bad_observation", "images[front]", ["list"]),
        (seen(images=np.zeros(3)), "bad_observation", "images", ["ndarray"]),
        (seen(images=None), "bad_observation", "images", ["NoneType"]),
        (seen(state=np.array([0, np.nan, 0, 0])), "bad_observation", "state", ["NaN", "y"]),
        (seen(state=np.zeros(5)), "bad_observation", "state", ["4", "[5]"]),
        (seen(state="here"), "bad_observation", "state", ["4"]),
        (seen(state=None), "bad_observation", "state", ["4"]),
        (seen(prompt=None), "bad_observation", "prompt", ["none"]),
        (seen(prompt=" "), "bad_observation", "prompt", ["1 to"]),
        (seen(prompt="open " * 30), "bad_observation", "prompt", ["16 tokens"]),
        (seen(prompt=f"{TASKS[0]}\nAdvantage: negative"), "bad_observation", "prompt", ["the task alone"]),
        ({"observation": None}, "bad_message", "observation", ["map"]),
        ({"observation": [1]}, "bad_message", "observation", ["map", "list"]),
        ({"deadline_ms": "soon"}, "bad_message", "deadline_ms", ["number"]),
        ({"deadline_ms": float("nan")}, "bad_message", "deadline_ms", ["finite"]),
        ({"seed": -1}, "bad_message", "seed", ["whole"]),
        ({"seed": 1.5}, "bad_message", "seed", ["whole"]),
        ({"robot": "x" * 65}, "bad_message", "robot", ["64"]),
        ({"robot": 3}, "bad_message", "robot", ["text"]),
        ({"type": "dance"}, "bad_message", "type", ["act", "dance"]),
        ({"type": None}, "bad_message", "type", ["act"]),
    ],
)
def test_what_is_wrong_is_named(served: Served, parts: dict, code: str, field: str, words: list[str]) -> None:
    with NativeClient(served.url()) as client:
        reply = client.ask(act(SPEC, 5, **parts))
        assert (reply["type"], reply["code"], reply.get("field")) == ("error", code, field), reply
        assert reply["seq"] == 5
        assert all(word in reply["message"] for word in words), reply["message"]
        assert client.ask(act(SPEC, 6))["type"] == "chunk", "the connection is kept"


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


HOSTILE = {
    "nothing": b"",
    "a number": b"\x01",
    "a cut map": wire.pack(act(SPEC))[:50],
    "noise": bytes(range(256)),
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "an array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "a text of 4 gigabytes": b"\xdb\xff\xff\xff\xff",
    "deep": nested(900),
    "deeper": nested(100_000),
    "an object array": msgpack.packb(
        {
            "type": "act",
            "observation": {"state": {b"__ndarray__": True, b"data": b"x" * 8, b"dtype": "|O", b"shape": [1]}},
        }
    ),
    "a huge shape": msgpack.packb(
        {
            "type": "act",
            "observation": {"state": {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [2**40, 2**40]}},
        }
    ),
    "a negative shape": msgpack.packb(
        {
            "type": "act",
            "observation": {"state": {b"__ndarray__": True, b"data": b"x" * 4, b"dtype": "<f4", b"shape": [-1]}},
        }
    ),
    "an extension": msgpack.packb(msgpack.ExtType(5, b"x")),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("native", [True, False])
def test_hostile_bytes_get_an_error_and_harm_nobody(served: Served, name: str, native: bool) -> None:
    with NativeClient(served.url()) as bystander:
        protocols: Any = ["recap.v1"] if native else None
        with connect(served.url(), subprotocols=protocols, compression=None, proxy=None) as socket:
            socket.recv(10)
            socket.send(HOSTILE[name])
            reply = socket.recv(10)
            if native:
                assert wire.unpack(reply)["code"] == "bad_message"  # type: ignore[arg-type]
            else:
                assert isinstance(reply, str) and "bad_" in reply
                with pytest.raises(ConnectionClosed):
                    socket.recv(10)
        assert bystander.ask(act(SPEC))["type"] == "chunk"


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_no_bytes_silence_the_service(served: Served, data: bytes) -> None:
    with NativeClient(served.url()) as client:
        client.socket.send(data)
        assert client.receive()["type"] in ("error", "pong")


def test_a_text_frame_is_told_that_frames_are_binary(served: Served) -> None:
    with NativeClient(served.url()) as client:
        client.socket.send("hello")
        assert "binary" in client.receive()["message"]
        assert client.ask({"type": "ping", "t": 0})["type"] == "pong"


def test_an_oversized_message_gets_an_error_and_an_oversized_frame_a_closed_door(served: Served) -> None:
    with NativeClient(served.url()) as client:
        client.socket.send(b"\0" * (served.service.limits.message + 1))
        reply = client.receive()
        assert reply["code"] == "too_large" and str(served.service.limits.message) in reply["expected"]
        assert client.ask(act(SPEC))["type"] == "chunk"
        client.socket.send(b"\0" * (served.service.limits.frame + 1))
        assert client.until_closed()[1] == 1009
    with NativeClient(served.url()) as client:
        assert client.ask(act(SPEC))["type"] == "chunk"


def _vanish(client: NativeClient) -> None:
    client.socket.socket.close()


@pytest.mark.parametrize("leave", [lambda c: c.socket.close(), _vanish])
def test_a_client_that_vanishes_leaves_nothing_behind(served: Served, leave: Callable[[NativeClient], None]) -> None:
    from service_harness import eventually

    before = served.service.connections.count
    with NativeClient(served.url()) as bystander:
        with served.engine.held():
            bystander.send(act(SPEC, 1))
            served.engine.entered.wait(10)
            client = NativeClient(served.url())
            client.send(act(SPEC, 1))
            eventually(lambda: served.service.batcher.depth == 1)
            leave(client)
            eventually(lambda: served.service.batcher.depth == 0)
        assert bystander.receive()["type"] == "chunk"
    eventually(lambda: served.service.connections.count == before)


def test_an_engine_that_raises_is_an_error_for_its_callers_and_not_for_the_next(served: Served) -> None:
    with NativeClient(served.url()) as client:
        served.engine.failure = RuntimeError("device lost")
        try:
            reply = client.ask(act(SPEC, 4))
            assert (reply["code"], reply["seq"]) == ("internal", 4) and "device lost" in reply["message"]
            assert served.get("/readyz")[0] == 503 and served.get("/livez")[0] == 200
        finally:
            served.engine.failure = None
        assert client.ask(act(SPEC))["type"] == "chunk"
        assert served.get("/readyz")[0] == 200


def test_a_model_of_another_shape_is_not_passed_on(served: Served) -> None:
    with NativeClient(served.url()) as client:
        served.engine.edit = lambda outputs: {"actions": outputs["actions"][:, :3]}
        try:
            assert client.ask(act(SPEC))["code"] == "internal"
        finally:
            served.engine.edit = lambda outputs: outputs
