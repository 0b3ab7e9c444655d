"""What the policy service tells its recorder."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_client.images import JpegImage
from services.policy.chaining import Previous


@dataclass(frozen=True)
class Served:
    """One answered request.

    key: of the session, or of the protocol where sessions are single requests. t: time.monotonic [s] of the answer;
    t_obs: of the observation by the robot's clock, None where the protocol has none. number: of all answers of the
    service. seed, seq: of the noise. images: camera -> uint8 [H, W, 3] or `JpegImage`, as they came. actions float32
    [T, A] as sent. model: name, version, hash. timing: `server_timing`. previous: of real-time chunking.
    """

    key: Hashable
    robot: str
    episode: str
    dialect: str
    t: float
    t_obs: float | None
    number: int
    seq: int
    seed: int | None
    images: Mapping[str, Any]
    state: Any
    prompt: str
    actions: NDArray[np.float32]
    model: Mapping[str, str]
    timing: Mapping[str, float]
    previous: Previous | None = None

    @property
    def size(self) -> int:
        """Bytes that it keeps in memory, nearly."""
        frames = self.images.values()
        return 4096 + sum(len(f.data) if isinstance(f, JpegImage) else int(getattr(f, "nbytes", 0)) for f in frames)


@dataclass(frozen=True)
class Ended:
    """An episode of a session has ended. success None = not known."""

    key: Hashable
    success: bool | None
    reason: str


@dataclass(frozen=True)
class Judged:
    """The critic's value of the observation of answer `number`, which comes later than the answer."""

    number: int
    value: float
