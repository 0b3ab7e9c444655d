"""Which action is due now: chunks laid on the robot's control steps. Pure, no clock, no network."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Due:
    """The action for one control step and the number of the chunk it came from."""

    action: NDArray[np.float32]
    chunk: int


class ChunkQueue:
    """Plain switching: the newest chunk replaces the old one at once.

    Row i of a chunk belongs to the control step `step_of_observation + i`, so a reply that took two steps starts at its
    third row. execute: rows after which a new chunk is wanted; the rest is the reserve that bridges a slow service.
    """

    def __init__(self, execute: int) -> None:
        if execute < 1:
            raise ValueError(f"execute: expected at least 1 action per chunk, got {execute}")
        self.execute = execute
        self._actions: NDArray[np.float32] | None = None
        self._start = 0
        self._number = -1

    def clear(self) -> None:
        """Forget everything (start of an episode, takeover)."""
        self._actions = None

    def put(self, actions: NDArray[np.float32], step: int, number: int) -> None:
        """Lay a chunk [H, A] whose observation was taken at control step `step`; an older one is dropped."""
        if self._actions is None or step >= self._start:
            self._actions, self._start, self._number = actions, step, number

    def wants_chunk(self, step: int) -> bool:
        """Is it time to ask again, at control step `step`?"""
        if self._actions is None:
            return True
        return step - self._start >= min(self.execute, len(self._actions))

    def at(self, step: int) -> Due | None:
        """The action of control step `step`, None when the robot is starved."""
        row = step - self._start
        if self._actions is None or not 0 <= row < len(self._actions):
            return None
        return Due(self._actions[row], self._number)
