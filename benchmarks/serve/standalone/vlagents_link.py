"""A robot of vlagents: its client's call, on a thread of its own, for RPyC blocks."""

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import json_numpy
import numpy as np
from sample import Sample
from vlagents.client import RemoteAgent
from vlagents.policies.interface import CameraDataType, Obs, SingleObs


class VlagentsLink:
    """Over TCP, not its shared memory: what a robot on another machine gets. Encoded beforehand, as for all others."""

    def __init__(self, sample: Sample, timeout_s: float) -> None:
        jpeg = any(isinstance(frame, bytes) for frame in sample.images.values())
        cameras = {name: _text(frame) if isinstance(frame, bytes) else frame for name, frame in sample.images.items()}
        kind = CameraDataType.JPEG_ENCODED if jpeg else CameraDataType.RAW
        single = SingleObs(cameras=cameras, camera_data_type=kind, joints=sample.state)
        self._message = json_numpy.dumps(asdict(Obs(obs={"robot": single}, language_instruction=sample.prompt)))
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(1)

    async def open(self, port: int) -> None:
        self._agent = await self._on_thread(RemoteAgent, "127.0.0.1", port, "constant")

    async def ask(self) -> Any:
        return await self._on_thread(self._call)

    def ask_now(self) -> Any:
        """Without an event loop between."""
        return self._call()

    def actions(self, reply: Any) -> Any:
        return np.stack([act["robot"]["action"] for act in json_numpy.loads(reply)["acts"]])

    async def close(self) -> None:
        self._agent.c.close()
        self._thread.shutdown(wait=False)

    def _call(self) -> Any:
        return self._agent.c.root.act(self._message)

    async def _on_thread(self, call: Any, *arguments: Any) -> Any:
        async with asyncio.timeout(self._timeout_s):
            return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)


def _text(jpeg: bytes) -> str:
    return base64.urlsafe_b64encode(jpeg).decode()
