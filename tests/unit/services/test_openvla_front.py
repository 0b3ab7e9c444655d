"""POST /act: every JSON dialect gets the reply that its clients expect."""

import base64
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repository_factory import CHUNK, TASKS, robot_spec
from service_harness import Served, fetch, observation, policy_server
from services.common import json_numpy
from services.common.errors import ServiceError
from services.policy.fronts.openvla import ERROR_HEADER

SPEC = robot_spec()


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with policy_server(models) as server:
        yield server


def envelope(array: np.ndarray) -> dict[str, Any]:
    """As json-numpy writes it."""
    return {
        "__numpy__": base64.b64encode(array.tobytes()).decode(),
        "dtype": array.dtype.str,
        "shape": list(array.shape),
    }


def array(value: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(value["__numpy__"]), value["dtype"]).reshape(value["shape"])


def openvla() -> dict[str, Any]:
    seen = observation(SPEC)
    return {
        "image": envelope(seen["images"]["front"]),
        "top": envelope(seen["images"]["top"]),
        "state": envelope(seen["state"]),
        "instruction": TASKS[0],
        "unnorm_key": "bridge_orig",
    }


def post(served: Served, body: Any) -> Any:
    status, text = fetch(served.http("/act"), data=json.dumps(body).encode())
    assert status == 200, text
    return json.loads(text)


def test_openvla_gets_one_action_as_a_bare_envelope(served: Served) -> None:
    assert array(post(served, openvla())).shape == (4,)


def test_oft_gets_the_chunk_as_a_list_of_envelopes(served: Served) -> None:
    body = openvla()
    body["full_image"] = body.pop("image")
    reply = post(served, body)
    assert len(reply) == CHUNK and all(array(item).shape == (4,) for item in reply)


def test_a_doubly_encoded_request_gets_a_doubly_encoded_reply(served: Served) -> None:
    reply = post(served, {"encoded": json.dumps(openvla())})
    assert isinstance(reply, str) and array(json.loads(reply)).shape == (4,)


def test_plain_lists_get_plain_lists(served: Served) -> None:
    seen = observation(SPEC)
    body = {
        "images": {k: v.tolist() for k, v in seen["images"].items()},
        "state": seen["state"].tolist(),
        "instruction": TASKS[0],
    }
    for sent in (body, {"observation": body}):
        reply = post(served, sent)
        assert np.shape(reply["actions"]) == (CHUNK, 4) and reply["latency_ms"] > 0
    np.testing.assert_array_equal(served.engine.calls[-1]["images"][0, 0], seen["images"]["front"])


def test_legacy_clients_get_their_error_and_the_reason_beside_it(served: Served) -> None:
    body = openvla() | {"state": envelope(np.full(4, np.nan, np.float32))}
    request = urllib.request.Request(served.http("/act"), json.dumps(body).encode())
    with urllib.request.urlopen(request) as reply:
        assert json.loads(reply.read()) == "error"
        assert "bad_observation" in reply.headers[ERROR_HEADER] and "NaN" in reply.headers[ERROR_HEADER]


@pytest.mark.parametrize(
    "body, status, field",
    [
        (b"not json", 400, "body"),
        (b"[1, 2]", 400, "body"),
        (b"[" * 9_000, 400, "body"),
        (b"[" * 100_000, 413, "body"),
        (json.dumps({"instruction": TASKS[0]}).encode(), 422, "images[front]"),
        (json.dumps({"encoded": 3}).encode(), 400, "encoded"),
    ],
)
def test_other_clients_get_a_typed_error(served: Served, body: bytes, status: int, field: str) -> None:
    got, text = fetch(served.http("/act"), data=body)
    assert (got, json.loads(text)["error"]["field"]) == (status, field)


def test_an_oversized_body_is_refused(served: Served) -> None:
    status, text = fetch(served.http("/act"), data=b" " * (served.service.limits.message * 4 // 3 + 1))
    assert status == 413 and json.loads(text)["error"]["code"] == "too_large"


@pytest.mark.parametrize(
    "value",
    [
        {"__numpy__": "AAAA", "dtype": "|O", "shape": [1]},
        {"__numpy__": "AAAA", "dtype": "<f4", "shape": [1]},
        {"__numpy__": "AAAA", "dtype": "<f4", "shape": [-1]},
        {"__numpy__": "!!", "dtype": "|u1", "shape": [1]},
        {"__numpy__": "AAAA", "dtype": "<f4", "shape": [2**62, 2**62]},
        {"__numpy__": 3, "dtype": "|u1", "shape": [3]},
        {"__numpy__": "AAAA", "dtype": {"names": []}, "shape": [1]},
        {"__numpy__": "", "dtype": "|u1", "shape": [0, 2**62]},
    ],
)
def test_hostile_envelopes_are_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ServiceError):
        json_numpy.decode({"x": [value]})


def test_envelopes_come_back_as_they_went() -> None:
    for value in (np.arange(6, dtype="<f4").reshape(2, 3), np.array([True, False]), np.zeros((1, 2), "|u1")):
        np.testing.assert_array_equal(json_numpy.decode(json_numpy.encode(value)), value)
