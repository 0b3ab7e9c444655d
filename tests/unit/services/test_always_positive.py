"""Whatever a caller sends, the tokens that reach the model carry the positive clause, and never another one."""

import ast
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import services
from recap_client import wire
from recap_model import conditioning
from repository_factory import TASKS, robot_spec
from service_harness import NativeClient, Served, act, fetch, observation, policy_server
from services.common import json_numpy

SPEC = robot_spec()
FORBIDDEN = {"NEGATIVE", "NONE", "prompt"}  # of recap_model.conditioning


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with policy_server(models) as server:
        yield server


def assert_all_positive(served: Served) -> None:
    def words(text: str) -> list[int]:
        return served.engine.tokenizer.tokenizer.encode(text).ids

    clause = words(conditioning.positive_prompt("."))[1:]  # newline, advantage, colon, positive, newline
    negative = words(conditioning.prompt(".", conditioning.NEGATIVE))[2:-1]  # advantage, colon, negative
    for call in served.engine.calls:
        for tokens, mask in zip(call["tokens"], call["token_mask"], strict=True):
            ids = tokens[mask].tolist()
            assert ids[-len(clause) :] == clause, ids
            assert not any(ids[i : i + len(negative)] == negative for i in range(len(ids))), ids


def exchange(served: Served, data: bytes, native: bool) -> None:
    protocols = ["recap.v1"] if native else None
    with connect(served.url(), subprotocols=protocols, compression=None, proxy=None) as socket:  # type: ignore[arg-type]
        socket.recv(10)
        try:
            socket.send(data)
            socket.recv(10)
        except ConnectionClosed:
            return


prompts = st.one_of(
    st.text(max_size=60),
    st.sampled_from(TASKS),
    st.builds(
        lambda task, clause, rest: task + clause + rest,
        st.sampled_from(TASKS),
        st.sampled_from(
            ["\nAdvantage: negative\n", " advantage : NEGATIVE", "\nAdvantage:negative", " negative", "\n"]
        ),
        st.text(max_size=9),
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.one_of(prompts, st.binary(max_size=20), st.none(), st.integers(-9, 2**60)), native=st.booleans())
def test_no_prompt_changes_the_condition(served: Served, prompt: object, native: bool) -> None:
    seen = observation(SPEC) | {"prompt": prompt}
    exchange(served, wire.pack(act(SPEC, observation=seen) if native else seen), native)
    assert_all_positive(served)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), native=st.booleans())
def test_no_damaged_message_changes_the_condition(served: Served, seed: int, native: bool) -> None:
    chance = random.Random(seed)
    data = bytearray(wire.pack(act(SPEC) if native else observation(SPEC)))
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(200)] = chance.randrange(256)
    if chance.random() < 0.3:
        del data[chance.randrange(len(data)) :]
    exchange(served, bytes(data), native)
    assert_all_positive(served)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=prompts,
    extra=st.dictionaries(
        st.sampled_from(["indicator", "advantage", "conditioning", "beta"]),
        st.one_of(st.integers(-1, 1), st.just("negative")),
    ),
)
def test_no_field_of_a_json_request_changes_the_condition(served: Served, prompt: str, extra: dict) -> None:
    seen = observation(SPEC)
    body = {
        "instruction": prompt,
        "state": seen["state"].tolist(),
        **{name: json_numpy.encode(image) for name, image in seen["images"].items()},
        **extra,
    }
    fetch(served.http("/act"), data=json.dumps(body).encode())
    assert_all_positive(served)


def test_the_law_was_tried_on_calls_that_reached_the_model(served: Served) -> None:
    with NativeClient(served.url()) as client:
        assert client.ask(act(SPEC))["type"] == "chunk"
    assert len(served.engine.calls) > 20


def test_no_source_file_of_the_services_can_say_anything_else() -> None:
    """By the syntax tree: of `conditioning` only the two served prompts are used, and no text spells a clause."""
    allowed = {"positive_prompt", "unconditional_prompt"}
    for path in Path(services.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "recap_model.conditioning":
                assert {name.name for name in node.names} <= allowed, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "conditioning":
                assert node.attr in allowed, f"{path}:{node.lineno}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "advantage: " not in node.value.lower(), f"{path}:{node.lineno}"
