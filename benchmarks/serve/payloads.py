"""The observations that every server gets, and the robot they belong to."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.serve.standalone.sample import ACTIONS, Sample
from recap_client.images import encode_jpeg
from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim

TASK = "put the cup on the shelf"
_STATE = 14
_QUALITY = 90


@dataclass(frozen=True)
class Payload:
    """cameras frames of height x width, raw or as JPEG of quality 90, beside 14 numbers of state and a prompt."""

    name: str
    cameras: int
    height: int
    width: int
    jpeg: bool

    @property
    def robot(self) -> RobotSpec:
        names = [f"joint_{i}" for i in range(_STATE)]
        return RobotSpec(
            "bench",
            tuple(Camera(f"camera_{i}", self.height, self.width) for i in range(self.cameras)),
            tuple(StateDim(name, "rad") for name in names),
            tuple(ActionDim(f"joint_{i}", "rad", -3.2, 3.2) for i in range(ACTIONS)),
            30.0,
            (TASK,),
        )

    def sample(self) -> Sample:
        """The same one every time."""
        generator = np.random.default_rng(0)
        state = generator.uniform(-1, 1, _STATE).astype(np.float32)
        frames = {camera.name: _picture(generator, self.height, self.width) for camera in self.robot.cameras}
        if not self.jpeg:
            return Sample(state, dict(frames), TASK)
        return Sample(state, {name: encode_jpeg(frame, _QUALITY) for name, frame in frames.items()}, TASK)


PAYLOADS = {
    payload.name: payload
    for payload in (
        Payload("state", 1, 8, 8, jpeg=False),  # a spec has a camera; 192 bytes of it are as good as none
        Payload("2x224", 2, 224, 224, jpeg=False),
        Payload("3x224-jpeg", 3, 224, 224, jpeg=True),
        Payload("3x480x640", 3, 480, 640, jpeg=False),
        Payload("3x480x640-jpeg", 3, 480, 640, jpeg=True),
    )
}


def _picture(generator: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Smooth shapes and a camera's noise: JPEG has to work, and can."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in generator.uniform(0, 6, (3, 3))]
    noise = generator.normal(0, 3, (height, width, 3))
    return np.clip(128 + 80 * np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)
