"""The policy type `recap`: no weights, one session with the service for each robot of a batch."""

import os
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_IMAGES, OBS_STATE
from numpy.typing import NDArray
from torch import Tensor

from lerobot_policy_recap.configuration_recap import SERVED, RecapConfig
from recap_client.policy import RemotePolicy
from recap_client.robots.base import Observation
from recap_client.safety import SafetyLimits
from recap_client.session import DeadlineExceeded, ServiceUnavailable, served_spec
from recap_client.spec import RobotSpec, SpecError


class RecapPolicy(PreTrainedPolicy):  # type: ignore[misc]
    """Asks the service at `config.url`. Raises ServiceError when there is none, SpecError when it was made for a robot
    with other cameras, state or actions than `config` has features."""

    config_class = RecapConfig
    name = "recap"

    def __init__(self, config: RecapConfig, **_: Any) -> None:
        super().__init__(config)
        self.spec = served_spec(config.url, headers())
        check_features(config, self.spec)
        config.action_feature_names = [dim.name for dim in self.spec.action]
        self._links: list[RemotePolicy] = []
        self._due: deque[Tensor] = deque()
        self._episode, self._begun = 0, False

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: RecapConfig | None = None, **options: Any
    ) -> "RecapPolicy":
        """From a folder with a config.json alone: there are no weights to load."""
        known = {key: options[key] for key in ("revision", "cache_dir", "local_files_only") if key in options}
        policy = cls(config or RecapConfig.from_pretrained(pretrained_name_or_path, **known))
        policy.eval()
        return policy

    def reset(self) -> None:
        """An episode begins; the service hears of it with the first observation, which brings the task."""
        self._due.clear()
        self._begun = False

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The next action of every robot of the batch, float32 [B, A] in the units of the service's robot."""
        if not self._due:
            self._due.extend(self.predict_action_chunk(batch)[:, : self.config.n_action_steps].unbind(1))
        return self._due.popleft()

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """What the service answers to the observations of a batch, float32 [B, H, A]; all robots are asked at once."""
        observations = split(batch, self.spec)
        tasks = _tasks(batch.get("task"), len(observations), self.spec)
        self._begin(tasks)
        with ThreadPoolExecutor(len(observations)) as pool:
            chunks = list(pool.map(self._ask, self._links, observations, tasks))
        rows = min(len(chunk) for chunk in chunks)
        return torch.from_numpy(np.stack([chunk[:rows] for chunk in chunks])).to(self.config.device)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any] | None]:
        raise NotImplementedError(SERVED)

    def get_optim_params(self) -> dict[str, Any]:
        raise NotImplementedError(SERVED)

    def close(self) -> None:
        """Close the sessions."""
        for link in self._links:
            link.close()
        self._links.clear()

    def _begin(self, tasks: list[str]) -> None:
        config = self.config
        while len(self._links) < len(tasks):
            name = f"{config.robot}-{len(self._links)}"
            self._links.append(RemotePolicy(config.url, self.spec, robot=name, jpeg_quality=config.jpeg_quality,
                                            timeout_s=config.timeout_s, headers=headers()))  # fmt: skip
        if not self._begun:
            self._episode, self._begun = self._episode + 1, True
            for link, task in zip(self._links, tasks, strict=False):
                self._patiently(link.reset, f"{link.robot}-{self._episode}", task)

    def _ask(self, link: RemotePolicy, observation: Observation, task: str) -> NDArray[np.float32]:
        chunk = self._patiently(link.infer, observation, task)
        limits = SafetyLimits(self.spec)
        return np.stack([limits(action) for action in chunk.actions])

    def _patiently(self, call: Any, *arguments: Any) -> Any:
        """Call again while the service is away: LeRobot has no other answer to a missing action than to end."""
        until = time.monotonic() + self.config.patience_s
        while True:
            try:
                return call(*arguments)
            except (ServiceUnavailable, DeadlineExceeded):
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)


def check_features(config: RecapConfig, spec: RobotSpec) -> None:
    """Raise SpecError unless LeRobot's features are those of the service's robot (more cameras are no harm)."""
    inputs, outputs = config.input_features or {}, config.output_features or {}
    cameras = [_camera(key, spec) for key in config.image_features]
    if inputs and not set(spec.camera_names) <= set(cameras):
        raise SpecError(f"{config.url}: cameras: expected {list(spec.camera_names)} (service), got {cameras}; "
                        "rename with --rename_map")  # fmt: skip
    for key, features, dims in ((OBS_STATE, inputs, spec.state), (ACTION, outputs, spec.action)):
        if features and (key not in features or tuple(features[key].shape) != (len(dims),)):
            got = list(features[key].shape) if key in features else "none"
            raise SpecError(
                f"{config.url}: {key}: expected [{len(dims)}] {[d.name for d in dims]} (service), got {got}"
            )
    names = [dim.name for dim in spec.action]
    if config.action_feature_names and config.action_feature_names != names:
        raise SpecError(f"{config.url}: {ACTION}: expected {names} (service), got {config.action_feature_names}")


def split(batch: Mapping[str, Any], spec: RobotSpec) -> list[Observation]:
    """The observations of a batch: `observation.state` [B, S], `observation.images.<camera>` [B, 3, H, W] as floats in
    [0, 1] or uint8. A sole camera may be called `observation.image`."""
    if OBS_STATE not in batch:
        raise SpecError(f"recap: expected {OBS_STATE} in the batch, got {sorted(map(str, batch))}")
    state = batch[OBS_STATE].detach().cpu().numpy().astype(np.float32)
    images = {_camera(key, spec): _frames(value) for key, value in batch.items()
              if key == OBS_IMAGE or key.startswith(OBS_IMAGES + ".")}  # fmt: skip
    images = {name: frames for name, frames in images.items() if name in spec.camera_names}
    now = time.monotonic()
    return [Observation({name: frames[i] for name, frames in images.items()}, state[i], now) for i in range(len(state))]


def _camera(key: str, spec: RobotSpec) -> str:
    return spec.camera_names[0] if key == OBS_IMAGE and len(spec.cameras) == 1 else key.removeprefix(OBS_IMAGES + ".")


def _frames(images: Tensor) -> NDArray[np.uint8]:
    if images.dtype != torch.uint8:
        images = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())


def _tasks(task: str | list[str] | None, count: int, spec: RobotSpec) -> list[str]:
    if not task and len(spec.tasks) == 1:
        task = spec.tasks[0]
    tasks = [task] * count if isinstance(task, str) else list(task or [])
    if len(tasks) != count or not all(tasks):
        raise ValueError(f"recap: task: expected one for each of {count} robots, got {task!r}")
    return tasks


def headers() -> dict[str, str]:
    """The key of the service, from RECAP_API_KEY."""
    key = os.environ.get("RECAP_API_KEY")
    return {"Authorization": f"Api-Key {key}"} if key else {}
