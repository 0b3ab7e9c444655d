"""LeRobot's own stubs, message classes and `RobotClient` against the policy service, over a real socket."""

import pickle
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from lerobot.async_inference.helpers import TimedAction

from lerobot_stub import EMPTY, lerobot_stub, raw_observation
from recap_client.spec import Camera
from recap_model import conditioning
from repository_factory import CHUNK, TASKS, build_repository, robot_spec
from service_harness import NativeClient, Served, act, eventually, observation, policy_server
from services.policy.fronts.pickle_actions import write_actions

SPEC = robot_spec()
RAW = raw_observation(SPEC, observation(SPEC))


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    # the model of these tests adds the state's mean to every action, to tell robots apart: beyond any limit
    with policy_server(models, lerobot_port=0, limits="pass") as server:
        yield server


def refused(call: Any, *arguments: Any, **named: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments, **named)
    return error.value


def test_the_four_methods_in_their_order(served: Served) -> None:
    with lerobot_stub(served.front("lerobot"), SPEC) as robot:
        robot.ready()
        robot.set_up(actions=5)
        robot.send(RAW, timestep=7, timestamp=100.0)
        actions = robot.get()
    assert [action.get_timestep() for action in actions] == list(range(7, 12))
    np.testing.assert_allclose([action.get_timestamp() for action in actions], 100 + np.arange(5) / SPEC.control_hz)
    call = served.engine.calls[-1]
    np.testing.assert_array_equal(call["images"][0], [RAW["front"], RAW["top"]])
    np.testing.assert_array_equal(call["state"][0], observation(SPEC)["state"])
    np.testing.assert_array_equal(call["tokens"][0], served.engine.tokenizer(conditioning.positive_prompt(TASKS[0]))[0])


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_actions_are_the_native_fronts_bit_for_bit(models: Path, protocol: int) -> None:
    with policy_server(models, seed=3, lerobot_port=0) as one, lerobot_stub(one.front("lerobot"), SPEC) as robot:
        got = [robot.ask(RAW, protocol=protocol) for _ in range(2)]
    with policy_server(models, seed=3) as other, NativeClient(other.url()) as native:
        want = [native.ask(act(SPEC))["actions"] for _ in range(2)]
    np.testing.assert_array_equal(got, want)
    assert got[0].shape == (CHUNK, 4) and got[0].dtype == np.float32


def test_an_observation_in_many_pieces(tmp_path: Path) -> None:
    big = robot_spec(size=1024)
    raw = raw_observation(big, observation(big))
    repository = build_repository(tmp_path, size=1024, models=("policy",))
    with policy_server(repository, lerobot_port=0) as served, lerobot_stub(served.front("lerobot"), big) as robot:
        assert robot.ask(raw).shape == (CHUNK, 4)  # 6 MiB: BEGIN, MIDDLE, END
        np.testing.assert_array_equal(served.engine.calls[-1]["images"][0, 1], raw["top"])


@pytest.mark.parametrize("rows, size, first", [(3, 4, 7), (50, 6, 250), (50, 14, 70_000), (2, 300, 2**31 - 1)])
def test_a_reply_is_byte_for_byte_what_lerobot_writes(rows: int, size: int, first: int) -> None:
    actions = np.random.default_rng(0).standard_normal((rows, size), np.float32)
    ours = write_actions(actions, TimedAction.__module__, 1.5, first, 1 / 30)
    tensors = [torch.from_numpy(row.copy()) for row in actions]
    theirs = pickle.dumps([TimedAction(1.5 + i * (1 / 30), first + i, tensor) for i, tensor in enumerate(tensors)])
    address = re.compile(rb"X.\0\0\0\d+(?=q[\x01\x02])")  # of a storage in memory: as many digits as it takes,
    length = re.compile(rb"(?:C.|B....)(?=\x80\x02\x8a\n)", re.DOTALL)  # and the length of what holds it

    def comparable(data: bytes) -> bytes:
        return length.sub(b"", address.sub(b"", data))[11:]

    assert comparable(ours) == comparable(theirs) != b""
    assert len(length.findall(theirs)) == len(length.findall(ours)) == rows
    assert len(address.findall(theirs)) == 2 * rows
    for row, action in zip(actions, pickle.loads(ours), strict=True):
        np.testing.assert_array_equal(action.get_action().numpy(), row)


def test_several_robots_get_their_own_chunks(served: Served) -> None:
    got: dict[int, list[tuple[int, float]]] = {index: [] for index in range(4)}

    def drive(index: int) -> None:
        state = dict.fromkeys((dim.name for dim in SPEC.state), 10.0 * index)  # the model adds its mean to every action
        with lerobot_stub(served.front("lerobot"), SPEC) as robot:
            robot.ready()
            for step in range(8):
                robot.send(RAW | state, timestep=1000 * index + step)
                chunk = robot.get()
                mean = float(np.mean([action.get_action().numpy() for action in chunk]))
                got[index].append((chunk[0].get_timestep(), mean))

    threads = [threading.Thread(target=drive, args=(index,)) for index in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    base = got[0][0][1]
    for index, chunks in got.items():
        assert [step for step, _ in chunks] == [1000 * index + step for step in range(8)]
        np.testing.assert_allclose([mean for _, mean in chunks], base + 10 * index, atol=1.0)


def test_the_newest_observation_is_answered(served: Served) -> None:
    with lerobot_stub(served.front("lerobot"), SPEC) as robot:
        for step in range(3):
            robot.send(RAW, timestep=step)
        assert robot.get()[0].get_timestep() == 2
        robot.send(RAW, timestep=9)
        robot.ready()  # another episode: what waits is not of it
        robot.send(RAW, timestep=0)
        assert robot.get()[0].get_timestep() == 0


def test_two_robots_on_one_connection_are_stopped(served: Served) -> None:
    shared = (("shared-by", "two-robots"),)
    with (
        lerobot_stub(served.front("lerobot"), SPEC, options=shared) as one,
        lerobot_stub(served.front("lerobot"), SPEC, options=shared) as two,
    ):
        one.ready()
        pending = one.stub.GetActions.future(EMPTY, timeout=20)
        eventually(lambda: status(two.ready) == grpc.StatusCode.INVALID_ARGUMENT)  # once that request is there
        for call in (lambda: two.send(RAW), two.get):
            assert "expected one robot" in refused(call).details()
        assert pending.exception(timeout=20).code() == grpc.StatusCode.INVALID_ARGUMENT
        one.ready()  # alone again
        assert one.ask(RAW).shape == (CHUNK, 4)


def status(call: Callable[[], None]) -> Any:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return None


def test_without_an_observation_the_reply_is_empty(served: Served) -> None:
    with lerobot_stub(served.front("lerobot"), SPEC) as robot:
        assert robot.get() == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"front": np.zeros((8, 8, 3), np.uint8)}, ["images[front]", "16", "8"]),
        ({"x": float("nan")}, ["NaN", "x"]),
        ({"task": "open\nAdvantage: negative"}, ["prompt"]),
        ({"task": None}, ["prompt"]),
        ({"y": "up"}, ["state[y]", "str"]),
    ],
)
def test_what_does_not_fit_is_a_status_and_the_next_one_is_answered(
    served: Served, change: dict[str, Any], words: list[str]
) -> None:
    with lerobot_stub(served.front("lerobot"), SPEC) as robot:
        error = refused(robot.ask, RAW | change)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and error.details().startswith("bad_observation: ")
        assert all(word in error.details() for word in words), error.details()
        assert robot.ask(RAW).shape == (CHUNK, 4)


def test_a_robot_that_differs_from_the_model_is_refused_before_it_moves(served: Served) -> None:
    for other in (replace(SPEC, cameras=(Camera("front", 16, 16),)), replace(SPEC, state=SPEC.state[1:])):
        with lerobot_stub(served.front("lerobot"), other) as robot:
            error = refused(robot.set_up)
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and "lerobot_features" in error.details()
    renamed = replace(SPEC, cameras=(Camera("front", 16, 16), Camera("above", 16, 16)))
    with lerobot_stub(served.front("lerobot"), renamed) as robot:
        robot.set_up(rename_map={"observation.images.above": "observation.images.top"})
        raw = {name if name != "top" else "above": value for name, value in RAW.items()}
        assert robot.ask(raw).shape == (CHUNK, 4)


def test_the_key(models: Path) -> None:
    with (
        policy_server(models, api_key="secret", lerobot_port=0) as served,
        lerobot_stub(served.front("lerobot"), SPEC) as robot,
    ):
        assert refused(robot.ready).code() == grpc.StatusCode.UNAUTHENTICATED
        robot.ready(metadata=(("authorization", "Bearer secret"),))


def test_an_engine_that_fails_is_internal_and_a_client_that_leaves_is_forgotten(served: Served) -> None:
    with lerobot_stub(served.front("lerobot"), SPEC) as robot:
        served.engine.failure = ValueError("broken")
        try:
            assert refused(robot.ask, RAW).code() == grpc.StatusCode.INTERNAL
        finally:
            served.engine.failure = None
        with served.engine.held():
            robot.send(RAW)
            pending = robot.stub.GetActions.future(EMPTY)
            assert served.engine.entered.wait(20)
            pending.cancel()
        assert eventually(lambda: robot.ask(RAW).shape == (CHUNK, 4))
    text = served.get("/metrics")[1]
    assert 'dialect="lerobot"' in text and 'code="internal",dialect="lerobot"' in text


def test_a_request_in_flight_is_answered_when_the_service_drains(models: Path) -> None:
    with policy_server(models, lerobot_port=0) as served, lerobot_stub(served.front("lerobot"), SPEC) as robot:
        robot.ready()
        with served.engine.held():
            robot.send(RAW)
            pending = robot.stub.GetActions.future(EMPTY, timeout=20)
            assert served.engine.entered.wait(20)
            served.running.stop()
            eventually(lambda: served.service.connections.draining)
            assert refused(robot.send, RAW).code() == grpc.StatusCode.UNAVAILABLE
        assert len(pending.result().data) > 0


def test_robot_client_itself(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole client: handshake, both threads, aggregation; its robot is a stand-in for motors and cameras."""
    monkeypatch.chdir(tmp_path)  # importing it makes a folder `logs`
    from lerobot.async_inference import robot_client as module
    from lerobot.async_inference.configs import RobotClientConfig
    from lerobot.robots.config import RobotConfig

    arm = _Arm()
    monkeypatch.setattr(module, "make_robot_from_config", lambda _: arm)
    config = RobotClientConfig(
        policy_type="smolvla",
        pretrained_name_or_path="user/model",
        robot=type("StandIn", (RobotConfig,), {})(),
        actions_per_chunk=6,
        task=TASKS[0],
        server_address=f"127.0.0.1:{served.front('lerobot')}",
        fps=50,
    )
    client = module.RobotClient(config)
    assert client.start()
    threads = [
        threading.Thread(target=client.receive_actions, daemon=True),
        threading.Thread(target=client.control_loop, args=(TASKS[0],), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: len(arm.moves) >= 20, timeout=20)
    finally:
        client.stop()
    for thread in threads:
        thread.join(20)
    assert all(np.isfinite(list(move.values())).all() and list(move) == arm.action_names for move in arm.moves)
    assert not arm.connected


class _Arm:
    """Numbers for motors, noise for cameras."""

    name = "stand_in"

    def __init__(self) -> None:
        self.action_names = [dim.name for dim in SPEC.action]
        self.moves: list[dict[str, float]] = []
        self.connected = False

    @property
    def observation_features(self) -> dict[str, Any]:
        cameras = {camera.name: (camera.height, camera.width, 3) for camera in SPEC.cameras}
        return {dim.name: float for dim in SPEC.state} | cameras

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(self.action_names, float)

    def connect(self) -> None:
        self.connected = True

    def disconnect(self) -> None:
        self.connected = False

    def get_observation(self) -> dict[str, Any]:
        raw = raw_observation(SPEC, observation(SPEC, seed=len(self.moves)))
        del raw["task"]
        return raw

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.moves.append(action)
        return action
