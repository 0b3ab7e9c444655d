"""RoboArena's messages on openpi's websocket: its handshake, `endpoint`, DROID's names."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from recap_client import wire
from recap_client.spec import ActionDim, Camera, StateDim
from recap_model.observation import ObservationError
from repository_factory import CHUNK, TASKS, robot_spec
from service_harness import Served, observation, policy_server
from services.common.errors import ServiceError
from services.policy.fronts import roboarena

SPEC = robot_spec()
DROID = replace(
    SPEC,
    cameras=tuple(Camera(name, 16, 16) for name in ("left", "wrist", "right")),
    state=tuple(StateDim(f"joint_{i}", "rad") for i in range(7)) + (StateDim("gripper", "1"),),
    action=tuple(ActionDim(f"joint_{i}", "rad/s", -1, 1) for i in range(7)) + (ActionDim("gripper", "1", 0, 1),),
)


@dataclass(frozen=True)
class PolicyServerConfig:
    """The fields that RoboArena's client takes; any other is a TypeError there."""

    image_resolution: Any
    needs_wrist_camera: bool
    n_external_cameras: int
    needs_stereo_camera: bool
    needs_session_id: bool
    action_space: str


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with policy_server(models) as server:
        yield server


def opened(served: Served, path: str = roboarena.PATH) -> Any:
    return connect(served.url(f"/{path}"), compression=None, max_size=None, proxy=None)


def test_the_handshake_is_what_its_client_makes_its_configuration_of(served: Served) -> None:
    with opened(served) as socket:
        config = PolicyServerConfig(**wire.unpack(socket.recv(20)))
    assert config == PolicyServerConfig([16, 16], False, 2, False, False, "cartesian_position")
    assert PolicyServerConfig(**roboarena.server_config(DROID)) == PolicyServerConfig(
        [16, 16], True, 2, False, False, "joint_velocity"
    )
    mixed = replace(DROID, cameras=(Camera("wrist", 16, 16), Camera("left", 8, 8)))
    assert roboarena.server_config(mixed) | {"action_space": ""} == {
        "image_resolution": None,
        "needs_wrist_camera": True,
        "n_external_cameras": 1,
        "needs_stereo_camera": False,
        "needs_session_id": False,
        "action_space": "",
    }


@pytest.mark.parametrize("path", [roboarena.PATH, "", "act"])
def test_infer_is_answered_with_the_bare_chunk_and_reset_with_text(served: Served, path: str) -> None:
    seen = observation(SPEC)
    arena = {
        "endpoint": "infer",
        "observation/exterior_image_0_left": seen["images"]["front"],
        "observation/exterior_image_1_left": seen["images"]["top"],
        "observation/cartesian_position": seen["state"][:3],
        "observation/gripper_position": seen["state"][3:],
        "prompt": TASKS[0],
        "session_id": "a",
    }
    with opened(served, path) as socket:
        socket.recv(20)
        socket.send(wire.pack(arena))
        actions = wire.unpack(socket.recv(20))
        assert isinstance(actions, np.ndarray) and actions.shape == (CHUNK, 4)
        np.testing.assert_array_equal(served.engine.calls[-1]["state"][0], seen["state"])
        np.testing.assert_array_equal(served.engine.calls[-1]["images"][0], list(seen["images"].values()))
        socket.send(wire.pack({"endpoint": "reset", "session_id": np.array([4])}))
        assert socket.recv(20) == "reset successful"
        socket.send(wire.pack(seen))  # openpi's own message on the same connection
        assert wire.unpack(socket.recv(20))["actions"].shape == (CHUNK, 4)
    text = served.get("/metrics")[1]
    assert 'recap_act_requests_total{code="ok",dialect="roboarena"}' in text
    assert 'recap_act_requests_total{code="ok",dialect="openpi"}' in text


@pytest.mark.parametrize("name", ["kill", 3, None, ["infer"], b"infer"])
def test_another_endpoint_is_an_error_of_openpis_form(served: Served, name: Any) -> None:
    with opened(served) as socket:
        socket.recv(20)
        socket.send(wire.pack(observation(SPEC) | {"endpoint": name}))
        text = socket.recv(20)
        assert isinstance(text, str) and text.startswith("bad_message: endpoint: expected infer or reset")
        with pytest.raises(ConnectionClosed, match="1011"):
            socket.recv(20)


def test_droids_names_stand_for_the_spec_in_its_order() -> None:
    frames = {name: np.full((16, 16, 3), i, np.uint8) for i, name in enumerate(("a", "b", "c"))}
    body = {
        "observation/exterior_image_0_left": frames["a"],
        "observation/exterior_image_1_right": frames["b"],
        "observation/wrist_image_left": frames["c"],
        "observation/joint_position": np.arange(7.0),
        "observation/cartesian_position": np.zeros(6),
        "observation/gripper_position": 7.0,
    }
    named = roboarena.translated(body, DROID)
    np.testing.assert_array_equal(named["observation/state"], np.arange(8.0))
    assert named["observation/left"] is frames["a"]
    assert named["observation/right"] is frames["b"]
    assert named["observation/wrist"] is frames["c"]
    with pytest.raises(ObservationError, match=r"observation\.state: .*joint_0.*'joint_position': 3"):
        roboarena.translated({"observation/joint_position": np.zeros(3)}, DROID)
    with pytest.raises(ObservationError, match="joint_position: expected numbers"):
        roboarena.translated({"observation/joint_position": "left"}, DROID)


def test_names_of_the_spec_come_first() -> None:
    body = {"observation/left": 1, "observation/exterior_image_0_left": 2, "observation/state": 3, "endpoint": "infer"}
    assert roboarena.translated(body, DROID) == body


def test_any_session_id_is_text_of_bounded_length() -> None:
    for value in ("a" * 500, b"\xff", np.zeros(1), 7, 0.5, np.array("b" * 500)):
        name = roboarena.session_id({"session_id": value})
        assert isinstance(name, str) and len(name) <= 128
    for value in (np.zeros(5), np.zeros(0), {"a": 1}, [1]):
        with pytest.raises(ServiceError, match="session_id: expected text or a number"):
            roboarena.session_id({"session_id": value})
    assert roboarena.session_id({}) is None
    assert roboarena.endpoint({}) is None
    with pytest.raises(ServiceError):
        roboarena.endpoint({"endpoint": np.zeros(2)})
