"""The configuration of the policy type `recap`."""

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.optim import LRSchedulerConfig, OptimizerConfig

SERVED = "recap: a served policy is trained with `recap train`, not with lerobot-train"


@PreTrainedConfig.register_subclass("recap")
@dataclass
class RecapConfig(PreTrainedConfig):  # type: ignore[misc]
    """url: of the policy service. n_action_steps: actions of a chunk that are executed before the next is asked for,
    None = all. jpeg_quality: send JPEG instead of raw frames. timeout_s: for connecting and for a reply; patience_s:
    how long a service that is away is waited for. robot: the name that the service's log and metrics show.

    action_feature_names: set from the service; when LeRobot sets it from a dataset, it is compared.
    """

    url: str = "ws://127.0.0.1:8000/act"
    n_action_steps: int | None = None
    jpeg_quality: int | None = None
    timeout_s: float = 5.0
    patience_s: float = 10.0
    robot: str = "lerobot"
    action_feature_names: list[str] | None = None
    device: str | None = "cpu"
    push_to_hub: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_action_steps is not None and self.n_action_steps < 1:
            raise ValueError(f"recap: n_action_steps: expected at least 1 or none, got {self.n_action_steps}")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> OptimizerConfig:
        raise NotImplementedError(SERVED)

    def get_scheduler_preset(self) -> LRSchedulerConfig | None:
        return None

    def validate_features(self) -> None:
        """Features are compared with the service when the policy is made."""
