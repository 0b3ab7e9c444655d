"""Images -> tokens. One tower shared by all cameras, so cameras go through it as one batch."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recap_model.policy.config import VisionConfig


class ConvTower(nn.Module):
    """Strided convolutions, then one linear map per grid cell plus a learned position.

    A convolutional stem learns from thousands of frames where a patch embedding needs millions.
    """

    def __init__(self, config: VisionConfig, width: int) -> None:
        super().__init__()
        sizes = (3, *config.channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1)
            for i, (a, b) in enumerate(pairwise(sizes))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for channels in config.channels)
        self.project = nn.Linear(config.channels[-1], width)
        self.position = nn.Parameter(0.02 * torch.randn(config.tokens, width))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels float [N, 3, H, W] in [-1, 1] -> tokens [N, tokens, width]."""
        x = pixels
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        tokens = self.project(x.flatten(2).transpose(1, 2).to(self.project.weight.dtype))
        return tokens + self.position


def encode_cameras(tower: ConvTower, images: Tensor) -> Tensor:
    """uint8 [B, K, H, W, 3] -> [B, K * tokens, width]: all cameras in one pass through `tower`."""
    batch, cameras = images.shape[0], images.shape[1]
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    tokens = tower(pixels)
    return tokens.reshape(batch, cameras * tokens.shape[1], tokens.shape[2])
