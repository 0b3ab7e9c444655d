"""The image tower of SmolVLM2: SigLIP over 16 px patches, then a pixel-shuffle connector into the language width.

Frames of any shape are resized into the tower's square inside the model, as two matrix products: the robot sends what
its camera gives, and the exported graph holds no interpolation operator that engines disagree about.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recap_model.policy.config import PositionRule, SiglipConfig


def resize_matrix(length: int, target: int, padded: int) -> Tensor:
    """[padded, length]: bilinear resize of `length` pixels to `target`, preceded by padded - target zeros.

    Taken from torch's own interpolation of an identity, so that it has the same weights to the last bit.
    """
    if length == target:
        resized = torch.eye(length)
    else:
        eye = torch.eye(length)[None]
        resized = F.interpolate(eye, size=target, mode="linear", align_corners=False)[0].T.contiguous()
    return torch.cat([torch.zeros(padded - target, length), resized])


def resized_shape(frame: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) of a frame after the resize that fits it into a square (LeRobot's `resize_with_pad`)."""
    if frame == (side, side):
        return frame
    ratio = max(frame[1] / side, frame[0] / side)
    return int(frame[0] / ratio), int(frame[1] / ratio)


def position_ids(grid: int, rule: PositionRule) -> Tensor:
    """int64 [grid * grid]: row of the position table for each patch, as transformers computes it in training."""
    coordinates = torch.arange(grid, dtype=torch.float32)
    if rule == "float32_scaled":
        coordinates = coordinates / grid * (1 - 1e-6)
    else:
        coordinates = torch.clamp(coordinates * (1.0 / torch.tensor(grid)), max=1.0 - 1e-6)
        coordinates = coordinates.to(torch.bfloat16 if rule == "bfloat16" else torch.float32)
    rows = torch.bucketize(coordinates, torch.arange(1 / grid, 1.0, 1 / grid), right=True)
    return (rows[:, None] * grid + rows[None, :]).flatten()


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """[N, grid**2, E] -> [N, (grid / factor)**2, factor**2 * E]: each block of patches becomes one token."""
    grid = int(x.shape[1] ** 0.5)
    blocks = x.reshape(-1, grid // factor, factor, grid // factor, factor, x.shape[2])
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(-1, (grid // factor) ** 2, factor * factor * x.shape[2])


class SiglipLayer(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, config.intermediate), nn.Linear(config.intermediate, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, patches, width] -> the same."""
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class SiglipTower(nn.Module):
    """frame: (height, width) of the camera frames [px]; out: width of the tokens."""

    rows: Tensor
    columns: Tensor
    position_ids: Tensor

    def __init__(self, config: SiglipConfig, out: int, frame: tuple[int, int]) -> None:
        super().__init__()
        if config.image_size % config.patch_size or config.grid % config.shuffle:
            raise ValueError(
                f"vision: expected image_size a multiple of patch_size * shuffle "
                f"({config.patch_size} * {config.shuffle}), got {config.image_size}"
            )
        self.config, self.out = config, out
        self.patch = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.position = nn.Parameter(0.02 * torch.randn(config.grid**2, config.width))
        self.layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.connector = nn.Linear(config.width * config.shuffle**2, out, bias=False)
        height, width = resized_shape(frame, config.image_size)
        self.resizes = (height, width) != frame or height != width
        for name, matrix in (
            ("rows", resize_matrix(frame[0], height, config.image_size)),
            ("columns", resize_matrix(frame[1], width, config.image_size)),
            ("position_ids", position_ids(config.grid, config.positions)),
        ):
            self.register_buffer(name, matrix, persistent=False)

    def resize(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 3, side, side], padded with zeros left and top."""
        return (self.rows @ pixels) @ self.columns.T if self.resizes else pixels

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> tokens [N, tokens, out], scaled by sqrt(out) as SmolVLA does."""
        pixels = self.resize(images.permute(0, 3, 1, 2).float() / 255.0) * 2.0 - 1.0
        x = self.patch(pixels).flatten(2).transpose(1, 2) + self.position[self.position_ids]
        for layer in self.layers:
            x = layer(x)
        return self.connector(pixel_shuffle(self.norm(x), self.config.shuffle)) * self.out**0.5
