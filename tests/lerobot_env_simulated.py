"""A third-party LeRobot plug-in with a gym environment that takes a few milliseconds a step."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig

from repository_factory import TASKS


class Reach(gym.Env):  # type: ignore[type-arg]
    """Ends in success when the second joint has come to +1, which the mean state of the policy's graph drives it to."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 50}
    _max_episode_steps = 12
    task_description = TASKS[0]

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Dict({
            "pixels": gym.spaces.Box(0, 255, (16, 16, 3), np.uint8),
            "agent_pos": gym.spaces.Box(-99, 99, (3,), np.float64),
        })  # fmt: skip
        self.action_space = gym.spaces.Box(-20, 20, (3,), np.float32)
        self.task = "reach"

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        super().reset(seed=seed, options=options)
        self.position, self.steps = self.np_random.uniform(0, 0.1, 3), 0
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, Any]:
        self.position, self.steps = self.position + np.clip(action, -0.5, 0.5), self.steps + 1
        success = bool(self.position[1] >= 1)
        info: dict[str, Any] = {"is_success": success}
        if success:
            info["final_info"] = {"is_success": True}
        return self._observation(), float(success), success, False, info

    def render(self) -> np.ndarray:
        return np.full((16, 16, 3), 7, np.uint8)

    def _observation(self) -> dict[str, np.ndarray]:
        return {"pixels": self.render(), "agent_pos": self.position.copy()}


@EnvConfig.register_subclass("simulated_reach")
@dataclass
class ReachEnvConfig(EnvConfig):
    task: str = "reach"
    fps: int = 50
    features: dict[str, PolicyFeature] = field(default_factory=lambda: {
        "action": PolicyFeature(FeatureType.ACTION, (3,)), "agent_pos": PolicyFeature(FeatureType.STATE, (3,)),
        "pixels": PolicyFeature(FeatureType.VISUAL, (16, 16, 3)),
    })  # fmt: skip
    features_map: dict[str, str] = field(default_factory=lambda: {
        "action": "action", "agent_pos": "observation.state", "pixels": "observation.image",
    })  # fmt: skip

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:  # noqa: ARG002
        mode = gym.vector.AutoresetMode.SAME_STEP
        return {"reach": {0: gym.vector.SyncVectorEnv([Reach] * n_envs, autoreset_mode=mode)}}
