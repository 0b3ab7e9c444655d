"""Which action is due now: chunks laid on the actions that a robot runs one after another. Pure, no clock, no network.

A step here is a control step in which an action ran; one in which the robot held does not count. Row i of a chunk
belongs to the step of its observation + i, so a reply in whose time two actions ran starts at its third row: what
counts is the actions really consumed, never an estimate of the latency.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Strategy = Literal["switch", "latest", "ensemble", "rtc"]
STRATEGIES: tuple[Strategy, ...] = ("switch", "latest", "ensemble", "rtc")


@dataclass(frozen=True)
class Due:
    """The action for one control step and the number of the chunk it came from."""

    action: NDArray[np.float32]
    chunk: int


class Queue(Protocol):
    """What the control loop needs of a strategy."""

    def clear(self) -> None:
        """Forget everything (start of an episode, takeover)."""

    def put(self, actions: NDArray[np.float32], step: int, number: int) -> None:
        """Lay a chunk [H, A] whose observation was taken at step `step`; an older one is dropped."""

    def wants_chunk(self, step: int, delay: int = 0) -> bool:
        """Is it time to ask again, at step `step`? delay: control steps that the reply is expected to take."""

    def at(self, step: int) -> Due | None:
        """The action of step `step`, None when the robot is starved."""

    def rest(self, step: int) -> NDArray[np.float32] | None:
        """The newest chunk's rows from step `step` on, [n, A]; None when there are none."""


class ChunkQueue:
    """The newest chunk replaces the old one at once: plain switching, and what real-time chunking builds on.

    execute: rows after which a new chunk is wanted; the rest is the reserve that bridges a slow service. With 1, a new
    chunk is wanted as soon as there is a newer observation than the chunk's.
    """

    def __init__(self, execute: int) -> None:
        if execute < 1:
            raise ValueError(f"execute: expected at least 1 action per chunk, got {execute}")
        self.execute = execute
        self._actions: NDArray[np.float32] | None = None
        self._start = 0
        self._number = -1

    def clear(self) -> None:
        self._actions = None

    def put(self, actions: NDArray[np.float32], step: int, number: int) -> None:
        if self._actions is None or step >= self._start:
            self._actions, self._start, self._number = actions, step, number

    def wants_chunk(self, step: int, delay: int = 0) -> bool:
        if self._actions is None:
            return True
        return step - self._start >= min(self.execute, max(1, len(self._actions) - delay))

    def at(self, step: int) -> Due | None:
        rest = self.rest(step)
        return None if rest is None else Due(rest[0], self._number)

    def rest(self, step: int) -> NDArray[np.float32] | None:
        row = step - self._start
        if self._actions is None or not 0 <= row < len(self._actions):
            return None
        return self._actions[row:]


class EnsembleQueue:
    """Temporal ensembling of ACT (arXiv 2304.13705): the mean over all chunks that cover the step, weighted by
    exp(-decay * i), i = 0 for the oldest; asks whenever it can.

    decay: 0.01 is ACT's, nearly the plain mean; a negative one favours the newest. Dimensions that mean open or shut
    are averaged like the others.
    """

    def __init__(self, decay: float = 0.01) -> None:
        self._decay = decay
        self._newest = ChunkQueue(execute=1)
        self._chunks: dict[int, NDArray[np.float32]] = {}  # by the step of their observation

    def clear(self) -> None:
        self._newest.clear()
        self._chunks.clear()

    def put(self, actions: NDArray[np.float32], step: int, number: int) -> None:
        self._newest.put(actions, step, number)
        self._chunks[step] = actions
        for start in [s for s, chunk in self._chunks.items() if s + len(chunk) <= step]:
            del self._chunks[start]

    def wants_chunk(self, step: int, delay: int = 0) -> bool:
        return self._newest.wants_chunk(step, delay)

    def at(self, step: int) -> Due | None:
        rows = [chunk[step - start] for start, chunk in sorted(self._chunks.items()) if 0 <= step - start < len(chunk)]
        newest = self._newest.at(step)
        if newest is None or not rows:
            return None
        weights = np.exp(-self._decay * np.arange(len(rows)))
        mean = np.average(np.stack(rows), axis=0, weights=weights)
        return Due(mean.astype(np.float32), newest.chunk)

    def rest(self, step: int) -> NDArray[np.float32] | None:
        return self._newest.rest(step)


def queue_for(strategy: Strategy, execute: int) -> Queue:
    """The queue of a strategy. execute: rows of a chunk before asking again; `latest` and `ensemble` ask whenever they
    can. Raises ValueError for an unknown strategy."""
    if strategy not in STRATEGIES:
        raise ValueError(f"chunks: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy == "ensemble":
        return EnsembleQueue()
    return ChunkQueue(1 if strategy == "latest" else execute)
