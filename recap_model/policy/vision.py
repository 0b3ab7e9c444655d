"""Images -> tokens. One tower shared by all cameras, so cameras go through it as one batch."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recap_model.policy.config import ConvConfig, SiglipConfig, VisionConfig
from recap_model.policy.siglip import SiglipTower


class ConvTower(nn.Module):
    """Strided convolutions, then one linear map per grid cell plus a learned position.

    A convolutional stem learns from thousands of frames where a patch embedding needs millions.
    """

    def __init__(self, config: ConvConfig, width: int) -> None:
        super().__init__()
        sizes = (3, *config.channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1)
            for i, (a, b) in enumerate(pairwise(sizes))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for channels in config.channels)
        self.project = nn.Linear(config.channels[-1], width)
        self.position = nn.Parameter(0.02 * torch.randn(config.tokens, width))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> tokens [N, tokens, width]."""
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        tokens = self.project(x.flatten(2).transpose(1, 2).to(self.project.weight.dtype))
        return tokens + self.position


Tower = ConvTower | SiglipTower


def make_tower(config: VisionConfig, width: int, frame: tuple[int, int]) -> Tower:
    """The tower of `config` for frames (height, width) [px], with tokens of `width`."""
    if isinstance(config, SiglipConfig):
        return SiglipTower(config, width, frame)
    if frame != (config.image_size, config.image_size):
        raise ValueError(f"frames: expected {config.image_size} x {config.image_size} px for this tower, got {frame}")
    return ConvTower(config, width)


def encode_cameras(tower: nn.Module, images: Tensor) -> Tensor:
    """uint8 [B, K, H, W, 3] -> [B, K * tokens, width]: all cameras in one pass through `tower`."""
    batch, cameras = images.shape[0], images.shape[1]
    tokens = tower(images.flatten(0, 1))
    return tokens.reshape(batch, cameras * tokens.shape[1], tokens.shape[2])
