"""A policy without a model, registered as LeRobot's plug-ins are: what is then measured is the server."""

from dataclasses import dataclass
from typing import Any

from lerobot.configs import PreTrainedConfig


@PreTrainedConfig.register_subclass("recap_null")
@dataclass
class RecapNullConfig(PreTrainedConfig):  # type: ignore[misc]
    """Takes whatever features it is given; a chunk of zeros comes back."""

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> Any:
        return None

    def get_scheduler_preset(self) -> Any:
        return None

    def validate_features(self) -> None:
        pass
