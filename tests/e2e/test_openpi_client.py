"""The unmodified `openpi-client` against the policy service."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from recap_model import conditioning
from repository_factory import CHUNK, TASKS, robot_spec
from service_harness import Served, observation, policy_server

SPEC = robot_spec()


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with policy_server(models) as server:
        yield server


@pytest.mark.parametrize("path", ["", "/", "/act", "/any/other"])
def test_chunks_on_every_path(served: Served, path: str) -> None:
    policy = WebsocketClientPolicy(f"ws://127.0.0.1:{served.port}{path}")
    metadata = policy.get_server_metadata()
    assert metadata["model"]["name"] == "policy" and metadata["spec"]["chunk"] == CHUNK
    first, second = (policy.infer(observation(SPEC)) for _ in range(2))
    assert first["actions"].shape == (CHUNK, 4) and first["actions"].dtype == np.float32
    assert first["server_timing"]["infer_ms"] > 0 and first["policy_timing"]["infer_ms"] > 0
    assert "prev_total_ms" not in first["server_timing"] and second["server_timing"]["prev_total_ms"] > 0
    timings = [*first["server_timing"].values(), *first["policy_timing"].values()]
    assert all(isinstance(value, float) for value in timings)


def test_host_and_port_arguments_and_the_key(models: Path) -> None:
    with policy_server(models, api_key="secret") as served:
        policy = WebsocketClientPolicy("127.0.0.1", served.port, api_key="secret")
        assert policy.infer(observation(SPEC))["actions"].shape == (CHUNK, 4)


def test_the_action_chunk_broker_hands_out_one_action_at_a_time(served: Served) -> None:
    calls = len(served.engine.calls)
    broker = ActionChunkBroker(WebsocketClientPolicy(f"ws://127.0.0.1:{served.port}"), action_horizon=4)
    actions = [broker.infer(observation(SPEC))["actions"] for _ in range(8)]
    assert all(action.shape == (4,) for action in actions)
    assert len(served.engine.calls) - calls == 2
    broker.reset()
    assert broker.infer(observation(SPEC))["actions"].shape == (4,)


def test_observation_dialects_reach_the_model_as_the_same_inputs(served: Served) -> None:
    seen = observation(SPEC)
    images, state, prompt = seen["images"], seen["state"], seen["prompt"]
    slash = {f"observation/{name}": image for name, image in images.items()}
    dialects = [
        seen,
        seen | {"images": {name: image.transpose(2, 0, 1) for name, image in images.items()}},
        slash | {"observation/state": state.astype(np.float64), "prompt": prompt},
        {f"observation/images/{name}": image for name, image in images.items()}
        | {"observation/state": state, "prompt": prompt},
        {f"observation.images.{name}": image for name, image in images.items()}
        | {"observation.state": state.tolist(), "prompt": prompt.encode()},
        slash | {"observation/state": state, "prompt": np.str_(prompt)},
    ]
    policy = WebsocketClientPolicy(f"ws://127.0.0.1:{served.port}")
    tokens, _ = served.engine.tokenizer(conditioning.positive_prompt(TASKS[0]))
    for dialect in dialects:
        policy.infer(dialect)
        call = served.engine.calls[-1]
        np.testing.assert_array_equal(call["images"][0], [images["front"], images["top"]])
        np.testing.assert_array_equal(call["state"][0], state)
        np.testing.assert_array_equal(call["tokens"][0], tokens)


def test_float_images_are_scaled_as_openpi_scales_them(served: Served) -> None:
    seen = observation(SPEC)
    floats = {name: image.astype(np.float32) / 255 for name, image in seen["images"].items()}
    WebsocketClientPolicy(f"ws://127.0.0.1:{served.port}").infer(seen | {"images": floats})
    np.testing.assert_array_equal(served.engine.calls[-1]["images"][0, 0], (255 * floats["front"]).astype(np.uint8))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"state": np.full(4, np.nan)}, ["bad_observation", "state", "NaN"]),
        ({"images": {"front": np.zeros((8, 8, 3), np.uint8)}}, ["images[front]", "16", "8"]),
        ({"prompt": None}, ["prompt"]),
    ],
)
def test_an_error_arrives_as_text_and_ends_the_connection(served: Served, change: dict, words: list[str]) -> None:
    policy = WebsocketClientPolicy(f"ws://127.0.0.1:{served.port}")
    with pytest.raises(RuntimeError, match="Error in inference server") as error:
        policy.infer(observation(SPEC) | change)
    assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(Exception, match="1011"):
        policy.infer(observation(SPEC))


def test_the_health_address_is_openpis(served: Served) -> None:
    assert served.get("/healthz") == (200, "OK\n")
