"""Sizes of a SmolVLA-family policy. Plain data: no torch here, so services and command lines can read it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from recap_model.normalize import Mode


@dataclass(frozen=True)
class VisionConfig:
    """The image tower. `conv` learns from a few thousand frames; other towers plug in by `kind`.

    image_size: side of the square input [px]; channels: output channels of each stride-2 stage.
    Tokens per camera: (image_size / 2**len(channels))**2.
    """

    kind: Literal["conv"] = "conv"
    image_size: int = 64
    channels: tuple[int, ...] = (32, 48, 64, 128)

    @property
    def tokens(self) -> int:
        return int(self.image_size // 2 ** len(self.channels)) ** 2


@dataclass(frozen=True)
class LanguageConfig:
    """The prefix transformer (SmolLM2 layout: RMSNorm, rotary embedding, grouped-query attention, gated SiLU)."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    intermediate: int = 384
    vocabulary: int = 64


@dataclass(frozen=True)
class ExpertConfig:
    """The action expert: one layer beside each language layer, attending to that layer's keys and values.

    Layer i with i % self_attn_every == 0 attends jointly to the prefix and, causally, to the actions; the others attend
    to the prefix alone through their own key/value projections (SmolVLA section 3.2, `attention_mode=cross_attn`).
    """

    width: int = 96
    intermediate: int = 256
    self_attn_every: int = 2
    min_period: float = 4e-3
    max_period: float = 4.0


@dataclass(frozen=True)
class PolicyConfig:
    """A whole policy. state_dim, action_dim: of the robot. chunk: actions per sample. denoise_steps: Euler steps."""

    vision: VisionConfig
    language: LanguageConfig
    expert: ExpertConfig
    cameras: int
    state_dim: int
    action_dim: int
    chunk: int = 8
    max_tokens: int = 24
    denoise_steps: int = 8
    state_norm: Mode = "mean_std"
    action_norm: Mode = "mean_std"
    family: str = "smolvla"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "PolicyConfig":
        """Inverse of `to_json`; an unknown key raises TypeError."""
        data = dict(data)
        return PolicyConfig(
            vision=vision_from_json(data.pop("vision")),
            language=LanguageConfig(**data.pop("language")),
            expert=ExpertConfig(**data.pop("expert")),
            **data,
        )


def vision_from_json(data: dict[str, Any]) -> VisionConfig:
    return VisionConfig(**{**data, "channels": tuple(data["channels"])})
