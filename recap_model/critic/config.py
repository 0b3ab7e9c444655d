"""Sizes of a distributional critic. Plain data."""

from dataclasses import asdict, dataclass
from typing import Any

from recap_model.normalize import Mode
from recap_model.policy.config import LanguageConfig, VisionConfig, vision_from_json


@dataclass(frozen=True)
class CriticConfig:
    """bins: number of values on [low, high] that the distribution is over (pi*0.6 equation 1). use_state: False leaves
    the robot's state out; checkpoints from before this field have it."""

    vision: VisionConfig
    language: LanguageConfig
    cameras: int
    state_dim: int
    max_tokens: int = 24
    bins: int = 201
    low: float = -1.0
    high: float = 0.0
    dropout: float = 0.2
    state_norm: Mode = "mean_std"
    family: str = "smolvla"
    frame: tuple[int, int] | None = None
    use_state: bool = True

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of the camera frames [px]."""
        return self.frame or (self.vision.image_size, self.vision.image_size)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "CriticConfig":
        data = dict(data)
        if data.get("frame") is not None:
            data["frame"] = tuple(data["frame"])
        return CriticConfig(
            vision=vision_from_json(data.pop("vision")), language=LanguageConfig(**data.pop("language")), **data
        )
