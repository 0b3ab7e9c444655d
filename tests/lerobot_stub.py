"""LeRobot's own generated stubs and message classes against a port, without a robot."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import send_bytes_in_chunks

EMPTY = services_pb2.Empty()
LOCAL = (("grpc.use_local_subchannel_pool", 1),)  # else all channels of this process share one connection


def features(spec: Any) -> dict[str, Any]:
    """As `hw_to_dataset_features` makes them of a robot."""
    names = [dim.name for dim in spec.state]
    state = {"observation.state": {"dtype": "float32", "shape": (len(names),), "names": names}}
    return state | {
        f"observation.images.{camera.name}": {
            "dtype": "image",
            "shape": (camera.height, camera.width, 3),
            "names": ["height", "width", "channels"],
        }
        for camera in spec.cameras
    }


def raw_observation(spec: Any, seen: dict[str, Any]) -> dict[str, Any]:
    """An observation of `service_harness` as a LeRobot robot gives it."""
    state = {dim.name: float(value) for dim, value in zip(spec.state, seen["state"], strict=True)}
    return {**state, **seen["images"], "task": seen["prompt"]}


class LerobotStub:
    """The four methods."""

    def __init__(self, port: int, spec: Any, options: Any = LOCAL) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
        self.stub = services_pb2_grpc.AsyncInferenceStub(self.channel)
        self.spec = spec

    def ready(self, **more: Any) -> None:
        self.stub.Ready(EMPTY, timeout=20, **more)

    def set_up(self, actions: int = 50, **more: Any) -> None:
        config = RemotePolicyConfig("smolvla", "user/model", features(self.spec), actions, **more)
        self.instruct(pickle.dumps(config))

    def instruct(self, data: bytes) -> None:
        self.stub.SendPolicyInstructions(services_pb2.PolicySetup(data=data), timeout=20)

    def send(self, raw: Any, timestep: int = 0, timestamp: float = 100.0, protocol: int = 4) -> None:
        self.send_bytes(pickle.dumps(TimedObservation(timestamp, timestep, raw, True), protocol=protocol))

    def send_bytes(self, data: bytes) -> None:
        self.stub.SendObservations(send_bytes_in_chunks(data, services_pb2.Observation), timeout=20)

    def get(self) -> list[Any]:
        """The reply's actions, [] for an empty one."""
        data = self.stub.GetActions(EMPTY, timeout=20).data
        return pickle.loads(data) if data else []

    def ask(self, raw: Any, **more: Any) -> np.ndarray:
        self.send(raw, **more)
        return np.stack([item.get_action().numpy() for item in self.get()])


@contextmanager
def lerobot_stub(port: int, spec: Any, **options: Any) -> Iterator[LerobotStub]:
    stub = LerobotStub(port, spec, **options)
    try:
        yield stub
    finally:
        stub.channel.close()
