"""One robot's connection: who it is, its noise, and which of its observations is the newest."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.common.errors import ServiceError


@dataclass(eq=False)
class Session:
    """robot and episode name it towards the critic; fronts whose protocol has no names leave the defaults.

    forward: False for a robot that sends the critic its frames itself; the service then does not. model: name, version
    and hash of the one that gave the latest chunk, and that very map for as long as it is the same model.
    """

    robot: str
    dialect: str
    generator: np.random.Generator
    episode: str = "0"
    task: str | None = None
    forward: bool = True
    last_total_ms: float | None = None
    model: Mapping[str, str] | None = None
    _arrived: int = 0
    _submitted: int = field(default=0)

    def arrive(self) -> int:
        """Number an observation by its arrival."""
        self._arrived += 1
        return self._arrived

    def submit(self, ticket: int) -> None:
        """The observation goes to the engine now. Raises ServiceError `superseded` when a newer one went before it
        (JPEG decoding takes its time, and later frames may be done first)."""
        if ticket < self._submitted:
            raise ServiceError("superseded", "a newer observation of this session has taken its place")
        self._submitted = ticket

    def noise(self, shape: tuple[int, ...], seed: int | None, seq: int) -> NDArray[np.float32]:
        """Standard normal noise for the flow: from (seed, seq) when a seed is given, so that the same request gets the
        same chunk, else from the session's generator."""
        generator = self.generator if seed is None else np.random.default_rng([seed, seq])
        return generator.standard_normal(shape, dtype=np.float32)
