"""A third-party LeRobot plug-in: an arm and its leader, real LeRobot classes over a simulated body.

`install(folder)` makes what pip would: the metadata by which LeRobot finds it.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lerobot.robots import Robot, RobotConfig
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig

from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim
from recap_model.spec import PolicySpec
from repository_factory import CHUNK, MAX_TOKENS, TASKS, _write, policy_graph

JOINTS = ("pan.pos", "lift.pos", "grip.pos")
SAG, STEP = 0.25, 5.0
SPEC = RobotSpec("simulated_arm", (Camera("front", 16, 16),), tuple(StateDim(n, "deg") for n in JOINTS),
                 tuple(ActionDim(n, "deg", -20.0, 20.0) for n in JOINTS), 50.0, TASKS[:1])  # fmt: skip


def install(folder: Path, *names: str) -> None:
    """The metadata of installed distributions in `folder`, which is to be on sys.path."""
    for name in names or (__name__,):
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


def build_models(root: Path) -> Path:
    """A model repository for `SPEC`: a real ONNX graph, run by the real engine."""
    spec = PolicySpec(SPEC, CHUNK, MAX_TOKENS)
    _write(root / "policy", policy_graph(spec, guided=False), spec)
    return root


@RobotConfig.register_subclass("simulated_arm")
@dataclass(kw_only=True)
class SimulatedArmConfig(RobotConfig):
    joints: list[str] = field(default_factory=lambda: list(JOINTS))
    calibrated: bool = True
    size: int = 16


class SimulatedArm(Robot):
    """Position control: a joint moves at most STEP degrees a command towards its goal; `lift` rests SAG below it."""

    config_class = SimulatedArmConfig
    name = "simulated_arm"
    instances: ClassVar[list["SimulatedArm"]] = []

    def __init__(self, config: SimulatedArmConfig) -> None:
        super().__init__(config)
        self.config, self.position, self.sent = config, dict.fromkeys(config.joints, 0.0), []
        self.connections, self._connected = 0, False
        self.instances.append(self)

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        side = self.config.size
        return dict.fromkeys(self.config.joints, float) | {"front": (side, side, 3), "front_depth": (side, side, 1)}

    @cached_property
    def action_features(self) -> dict[str, type]:
        return dict.fromkeys(self.config.joints, float)

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def is_calibrated(self) -> bool:
        return self.config.calibrated

    def connect(self, calibrate: bool = True) -> None:  # noqa: ARG002
        self._connected, self.connections = True, self.connections + 1

    def disconnect(self) -> None:
        self._connected = False

    def calibrate(self) -> None:
        raise AssertionError("asks questions")

    def configure(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        side = self.config.size
        seen = {name: value - (SAG if name == "lift.pos" else 0.0) for name, value in self.position.items()}
        return seen | {
            "front": np.full((side, side, 3), 7, np.uint8),
            "front_depth": np.zeros((side, side, 1), np.uint8),
        }

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.sent.append(dict(action))
        for name, goal in action.items():
            self.position[name] += float(np.clip(goal - self.position[name], -STEP, STEP))
        return dict(self.position)


@TeleoperatorConfig.register_subclass("simulated_leader")
@dataclass(kw_only=True)
class SimulatedLeaderConfig(TeleoperatorConfig):
    joints: list[str] = field(default_factory=lambda: list(reversed(JOINTS)))
    goal: float = 2.0


class SimulatedLeader(Teleoperator):
    """Its joints come in another order than the follower's."""

    config_class = SimulatedLeaderConfig
    name = "simulated_leader"
    is_connected, is_calibrated, feedback_features = False, True, {}  # type: ignore[assignment]

    def __init__(self, config: SimulatedLeaderConfig) -> None:
        super().__init__(config)
        self.config = config

    @property
    def action_features(self) -> dict[str, type]:
        return dict.fromkeys(self.config.joints, float)

    def connect(self, calibrate: bool = True) -> None:  # noqa: ARG002
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def calibrate(self) -> None: ...
    def configure(self) -> None: ...
    def send_feedback(self, feedback: dict[str, Any]) -> None: ...

    def get_action(self) -> dict[str, float]:
        return {name: self.config.goal * (1 + JOINTS.index(name)) for name in self.config.joints}
