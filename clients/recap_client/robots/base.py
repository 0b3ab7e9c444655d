"""What a robot must offer to be driven and recorded. Any object with these methods is a robot; nothing to inherit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from recap_client.spec import RobotSpec


class RobotError(RuntimeError):
    """A robot cannot be opened, or was asked for something it does not have (task, style)."""


@dataclass(frozen=True)
class Observation:
    """One moment as the robot sees it.

    images: camera name -> uint8 [H, W, 3] RGB; state: float32 [S] in the units of the spec; t: `time.monotonic()` in s
    when the observation was taken.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    t: float


@dataclass(frozen=True)
class StepResult:
    """What became of one control step.

    done: the episode is over. success: None while not known. action: float32 [A], what was really applied where that
    differs from the command (a hold, a clip); None when the command was applied as given.
    """

    done: bool
    success: bool | None = None
    action: NDArray[np.float32] | None = None


class Robot(Protocol):
    """A robot at one control rate. Calls come from one thread, in the order reset, (observe, act | hold)*, close."""

    spec: RobotSpec

    def reset(self, task: str, seed: int) -> None:
        """Make ready for an episode of `task` (a name or a prompt of the spec). Raises RobotError on an unknown one."""

    def observe(self) -> Observation:
        """The newest cameras and state."""

    def act(self, action: NDArray[np.float32]) -> StepResult:
        """Carry out one action, float32 [A] in the units of the spec, for one control step. Must not block longer."""

    def hold(self) -> StepResult:
        """Hold position for one control step: what is done when there is no action."""

    def prompt(self, task: str) -> str:
        """The language prompt of a task given by name or prompt."""

    def close(self) -> None:
        """Release the hardware. May be called twice."""


class Teleoperator(Protocol):
    """A human, or what stands in for one. `style` names how this one works, for the log ("human" if unknown).

    A robot that has one offers `teleoperator(seed: int, style: str) -> Teleoperator`.
    """

    style: str

    def action(self) -> NDArray[np.float32]:
        """What the human would do now, float32 [A]."""
