"""Sizes of a SmolVLA-family policy. Plain data: no torch here, so services and command lines can read it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from recap_model.normalize import Mode

PositionRule = Literal["float32", "bfloat16", "float32_scaled"]


class PolicyConfigError(ValueError):
    """A configuration is malformed, or describes a layout that no implementation runs."""


@dataclass(frozen=True)
class ConvConfig:
    """A convolutional image tower: learns from a few thousand frames.

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
class SiglipConfig:
    """The SigLIP tower of SmolVLM2 with its pixel-shuffle connector. The defaults are SmolVLM2-500M's.

    image_size: side of the square that frames are resized into, keeping their shape and padding left and top [px];
    shuffle: pixel-shuffle factor, that is shuffle**2 patches become one token;
    positions: the dtype in which transformers computed the patch positions while the checkpoint was trained
    ("float32_scaled": float32 in transformers 4.55 to 4.57, whose first row and column came twice).
    """

    kind: Literal["siglip"] = "siglip"
    image_size: int = 512
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    shuffle: int = 4
    positions: PositionRule = "bfloat16"

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        return (self.grid // self.shuffle) ** 2


VisionConfig = ConvConfig | SiglipConfig


@dataclass(frozen=True)
class LanguageConfig:
    """The prefix transformer (SmolLM2 layout: RMSNorm, rotary embedding, grouped-query attention, gated SiLU).

    head: carry final norm and output embedding of the language model, which no action ever reads.
    """

    width: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    intermediate: int = 384
    vocabulary: int = 64
    head: bool = False


@dataclass(frozen=True)
class ExpertConfig:
    """The action expert: layers beside the language layers, each attending to its language layer's keys and values.

    attention "cross_attn": the layer at language layer i with i % self_attn_every == 0 attends jointly to the prefix
    and, causally, to the actions; the others attend to the prefix alone through their own key/value projections
    (self_attn_every 0: all of them). "self_attn": every layer attends jointly (SmolVLA section 3.2).
    layers: expert layers, evenly spread over the language layers; None = one beside each.
    """

    width: int = 96
    intermediate: int = 256
    self_attn_every: int = 2
    min_period: float = 4e-3
    max_period: float = 4.0
    attention: Literal["cross_attn", "self_attn"] = "cross_attn"
    layers: int | None = None


@dataclass(frozen=True)
class PolicyConfig:
    """A whole policy. state_dim, action_dim: of the robot. chunk: actions per sample. denoise_steps: Euler steps.

    frame: (height, width) of the camera frames [px], None = the tower's square. state_width, action_width: what the
    vectors are padded to with zeros inside the model, None = not at all. image_tokens: ids (fake_token_around_image,
    global-img) that stand around every camera's tokens, None = nothing does; empty_cameras: cameras of the
    pre-training that this robot lacks; of a missing camera only those two ids are ever seen. max_delay: so many first
    actions may be given instead of sampled (training-time real-time chunking, arXiv 2512.05964); 0 = trained without.
    """

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
    frame: tuple[int, int] | None = None
    state_width: int | None = None
    action_width: int | None = None
    image_tokens: tuple[int, int] | None = None
    empty_cameras: int = 0
    max_delay: int = 0

    def __post_init__(self) -> None:
        if self.family != "smolvla":
            raise PolicyConfigError(f"family: expected one of ['smolvla'], got {self.family!r}")
        for name, width, used in (
            ("state_width", self.state_width, self.state_dim),
            ("action_width", self.action_width, self.action_dim),
        ):
            if width is not None and width < used:
                raise PolicyConfigError(f"{name}: expected at least {used}, the robot's own, got {width}")
        if not 0 <= self.max_delay < self.chunk:
            raise PolicyConfigError(
                f"max_delay: expected 0 to {self.chunk - 1} actions of a chunk of {self.chunk}, got {self.max_delay}"
            )
        expert_plan(self.language, self.expert)

    @property
    def frame_size(self) -> tuple[int, int]:
        return self.frame or (self.vision.image_size, self.vision.image_size)

    @property
    def padded_state(self) -> int:
        return self.state_width or self.state_dim

    @property
    def padded_action(self) -> int:
        return self.action_width or self.action_dim

    @property
    def prefix_length(self) -> int:
        """Positions before the first action: images with what stands around them, text, state."""
        around = 0 if self.image_tokens is None else 3
        return self.cameras * (self.vision.tokens + around) + self.empty_cameras * around + self.max_tokens + 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "PolicyConfig":
        """Inverse of `to_json`. Raises PolicyConfigError on an unknown family, key or layout."""
        data = dict(data)
        for name in ("frame", "image_tokens"):
            if data.get(name) is not None:
                data[name] = tuple(data[name])
        try:
            return PolicyConfig(
                vision=vision_from_json(data.pop("vision")),
                language=LanguageConfig(**data.pop("language")),
                expert=ExpertConfig(**data.pop("expert")),
                **data,
            )
        except (KeyError, TypeError) as error:
            raise PolicyConfigError(f"policy config: {error}; got the keys {sorted(data)}") from error


@dataclass(frozen=True)
class ExpertLayer:
    """One expert layer. at: index of its language layer; joint: see `ExpertConfig`."""

    at: int
    joint: bool


def expert_plan(language: LanguageConfig, expert: ExpertConfig) -> tuple[ExpertLayer, ...]:
    """Which language layer each expert layer reads, and how. Raises PolicyConfigError for layouts LeRobot cannot run.

    LeRobot shapes an expert layer's projections by its own index and runs it by its language layer's: where the two
    disagree, and for a language layer that only a missing expert layer would have joined, its forward fails.
    """
    count = expert.layers or language.layers
    if count > language.layers or language.layers % count:
        raise PolicyConfigError(f"expert.layers: expected a divisor of {language.layers} language layers, got {count}")
    stride, every = language.layers // count, expert.self_attn_every
    is_joint = [expert.attention == "self_attn" or (every > 0 and i % every == 0) for i in range(language.layers)]
    lost = [i for i in range(language.layers) if i % stride and is_joint[i]]
    clash = [i for i in range(count) if is_joint[i] != is_joint[i * stride]]
    if lost or clash:
        raise PolicyConfigError(
            f"expert: expected attention 'cross_attn' with self_attn_every 0 when there are fewer expert layers "
            f"({count}) than language layers ({language.layers}), got {expert.attention!r} with {every}"
        )
    return tuple(ExpertLayer(i * stride, is_joint[i * stride]) for i in range(count))


def vision_from_json(data: dict[str, Any]) -> VisionConfig:
    """The tower's configuration by its `kind`."""
    kind = data.get("kind", "conv")
    if kind == "conv":
        return ConvConfig(**{**data, "channels": tuple(data["channels"])})
    if kind == "siglip":
        return SiglipConfig(**data)
    raise PolicyConfigError(f"vision.kind: expected 'conv' or 'siglip', got {kind!r}")
