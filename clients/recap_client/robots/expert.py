"""The scripted human of the simulated arm: demonstrations of mixed quality, and clean corrections.

Meta-World's own expert script acts on the true object positions; a style says how well it is imitated. Times are in
seconds, so that a pause lasts as long at any control rate.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recap_client.robots.base import RobotError
from recap_client.spec import RobotSpec


@dataclass(frozen=True)
class Style:
    """How a demonstrator works.

    share: part of mixed demonstrations. speed: range of the factor on translations. noise: standard deviation of the
    action noise. correlation: time constant of the noise [s], 0 = white. pause_rate: pauses per second. detours: most
    random waypoints in an episode (at least one if not 0). bias: standard deviation [m] of the error in x, y of where
    it thinks the object is.
    """

    share: float
    speed: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.1
    correlation: float = 0.0
    pause_rate: float = 0.0
    detours: int = 0
    bias: float = 0.0


STYLES = {
    "clean": Style(0.0),
    "fast": Style(0.25, noise=0.15, correlation=0.1),
    "slow": Style(0.40, speed=(0.4, 0.65), pause_rate=1.6),
    "detour": Style(0.20, speed=(0.6, 1.0), noise=0.4, detours=2),
    "bad": Style(0.15, noise=0.4, bias=0.05),
}
"""Name -> style; "mixed" draws one of them by share."""

_PAUSE = (0.075, 0.25)
_DETOUR = (0.15, 0.325)
_WORKSPACE = ((-0.3, 0.4, 0.08), (0.3, 0.85, 0.35))


class Arm(Protocol):
    """What the script needs of the simulated arm: the task it was reset to, its rate, and the true object positions."""

    spec: RobotSpec
    task: str
    full_observation: NDArray[np.float64]


class ScriptedExpert:
    """Implements `Teleoperator` for one episode of a `MetaWorldRobot` that has been reset.

    style: a name in `STYLES`, or "mixed". The same (style, seed) makes the same choices.
    """

    def __init__(self, robot: Arm, seed: int, style: str = "mixed") -> None:
        if style != "mixed" and style not in STYLES:
            raise RobotError(f"demonstration style: expected one of {['mixed', *STYLES]}, got {style!r}")
        from metaworld.policies import ENV_POLICY_MAP

        self._rng = np.random.default_rng([seed, 0x5C])
        self.style = self._draw() if style == "mixed" else style
        self._robot = robot
        make: Any = ENV_POLICY_MAP[robot.task + "-v3"]
        self._script = make()
        self._hz = robot.spec.control_hz
        chosen = self._chosen = STYLES[self.style]
        self._speed = self._rng.uniform(*chosen.speed)
        self._bias = self._rng.normal(0.0, chosen.bias, 2) if chosen.bias else np.zeros(2)
        self._noise = np.zeros(4)
        self._paused = 0
        self._detours = self._plan_detours(chosen.detours)
        self._step = 0

    def action(self) -> NDArray[np.float32]:
        observation = self._robot.full_observation.copy()
        observation[4:6] += self._bias
        observation[22:24] += self._bias  # the previous frame, stacked behind the present one
        wanted = np.asarray(self._script.get_action(observation), np.float64)
        wanted[:3] = np.clip(wanted[:3], -1.0, 1.0) * self._speed
        for start, end, waypoint in self._detours:
            if start <= self._step < end:
                wanted[:3] = np.clip(10.0 * (waypoint - observation[:3]), -1.0, 1.0) * self._speed
        self._step += 1
        if self._pausing():
            wanted[:3] = 0.0
            return np.clip(wanted, -1.0, 1.0).astype(np.float32)
        return np.clip(wanted + self._next_noise(), -1.0, 1.0).astype(np.float32)

    def _draw(self) -> str:
        names = [name for name, style in STYLES.items() if style.share]
        return str(self._rng.choice(names, p=[STYLES[name].share for name in names]))

    def _plan_detours(self, most: int) -> list[tuple[int, int, NDArray[np.float64]]]:
        plan = []
        for _ in range(self._rng.integers(1, most + 1) if most else 0):
            start = round(self._rng.uniform(0.0, 1.0) * self._hz)
            length = max(1, round(self._rng.uniform(*_DETOUR) * self._hz))
            plan.append((start, start + length, self._rng.uniform(*_WORKSPACE)))
        return plan

    def _pausing(self) -> bool:
        if self._paused == 0 and self._rng.random() < self._chosen.pause_rate / self._hz:
            self._paused = max(1, round(self._rng.uniform(*_PAUSE) * self._hz))
        pausing = self._paused > 0
        self._paused = max(0, self._paused - 1)
        return pausing

    def _next_noise(self) -> NDArray[np.float64]:
        fresh = self._rng.normal(0.0, 1.0, 4) * self._chosen.noise
        keep = np.exp(-1.0 / (self._hz * self._chosen.correlation)) if self._chosen.correlation else 0.0
        self._noise = keep * self._noise + np.sqrt(1.0 - keep**2) * fresh
        return self._noise
