"""A robot of LeRobot's asynchronous inference: its own messages and stubs, and its habits. A `GetActions` stands open
while the robot works, as its receiver thread keeps it, which hides the server's 33 ms where the robot asks rarely."""

import pickle
import time
from typing import Any

import grpc
import numpy as np
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import send_bytes_in_chunks
from sample import CHUNK, Sample
from socket_link import LinkError

_FIRST = 1_000_000  # steps of one robot; the next robot's start here, so that a chunk shows whose it is


class LerobotLink:
    """`must_go` as of a robot whose queue is empty: otherwise the server drops what looks like the last observation."""

    def __init__(self, sample: Sample, folder: str, number: int, timeout_s: float) -> None:
        self._sample, self._folder, self._timeout_s = sample, folder, timeout_s
        self._step = number * _FIRST
        joints = {f"joint_{i}": float(value) for i, value in enumerate(sample.state)}
        self._raw: dict[str, Any] = {**joints, **sample.images, "task": sample.prompt}
        self._chunk: Any = None

    async def open(self, port: int) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._stub = services_pb2_grpc.AsyncInferenceStub(self._channel)
        await self._stub.Ready(services_pb2.Empty(), timeout=self._timeout_s)
        joints = [name for name in self._raw if name.startswith("joint_")]
        features: dict[str, Any] = {
            "observation.state": {"dtype": "float32", "shape": (len(joints),), "names": joints}
        } | {
            f"observation.images.{name}": {"dtype": "image", "shape": frame.shape, "names": ["height", "width", "c"]}
            for name, frame in self._sample.images.items()
            if isinstance(frame, np.ndarray)
        }
        setup = RemotePolicyConfig("recap_null", self._folder, features, CHUNK)
        await self._stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(setup)), timeout=60)
        self._standing = self._stub.GetActions(services_pb2.Empty())

    async def ask(self) -> Any:
        self._step += 1
        observation = TimedObservation(time.time(), self._step, self._raw, must_go=True)
        pieces = send_bytes_in_chunks(pickle.dumps(observation), services_pb2.Observation, silent=True)
        await self._stub.SendObservations(pieces, timeout=self._timeout_s)
        limit = time.monotonic() + self._timeout_s
        while not (data := (await self._standing).data):
            self._standing = self._stub.GetActions(services_pb2.Empty())
            if time.monotonic() > limit:
                raise LinkError("no actions: GetActions stays empty")
        self._standing = self._stub.GetActions(services_pb2.Empty())
        chunk = pickle.loads(data)
        if chunk[0].get_timestep() != self._step:
            raise LinkError(f"the chunk of step {chunk[0].get_timestep()} came for step {self._step}: another robot's")
        return chunk

    def actions(self, reply: Any) -> Any:
        return np.stack([action.get_action().numpy() for action in reply])

    async def close(self) -> None:
        self._standing.cancel()
        await self._channel.close()
