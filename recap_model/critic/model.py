"""Distributional critic V(observation, task): softmax over value bins, read at a learned token (pi*0.6, IV-A)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recap_model.critic.config import CriticConfig
from recap_model.normalize import NormStats
from recap_model.policy.language import LanguageModel, prefix_mask
from recap_model.policy.vision import encode_cameras, make_tower


class Critic(nn.Module):
    """The policy's prefix at a smaller size; a readout token at the end sees everything."""

    state_shift: Tensor
    state_scale: Tensor
    support: Tensor

    def __init__(self, config: CriticConfig, stats: dict[str, NormStats]) -> None:
        super().__init__()
        self.config = config
        width = config.language.width
        self.vision = make_tower(config.vision, width, config.frame_size)
        self.language = LanguageModel(config.language)
        self.state_in = nn.Linear(config.state_dim, width) if config.use_state else None
        self.readout = nn.Parameter(0.02 * torch.randn(width))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, config.bins)
        shift, scale = stats["state"].affine(config.state_norm)
        self.register_buffer("state_shift", torch.tensor(shift, dtype=torch.float32), persistent=False)
        self.register_buffer("state_scale", torch.tensor(scale, dtype=torch.float32), persistent=False)
        self.register_buffer("support", torch.linspace(config.low, config.high, config.bins), persistent=False)

    def see(self, images: Tensor) -> Tensor:
        """uint8 [B, K, H, W, 3] -> image tokens [B, K * tokens, width]."""
        return encode_cameras(self.vision, images)

    def read(self, image_tokens: Tensor, state: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """image tokens, state [B, S] (physical units; ignored with use_state=False), prompt ids int [B, L] and mask
        [B, L] -> logits [B, bins]."""
        last = [self.readout.expand(tokens.shape[0], 1, self.config.language.width)]
        if self.state_in is not None:
            last.insert(0, self.state_in((state - self.state_shift) / self.state_scale)[:, None, :])
        x = torch.cat([image_tokens, self.language.embed_text(tokens), *last], dim=1)
        x = F.dropout(x, self.config.dropout, self.training)
        ones = [torch.ones_like(token_mask[:, :1])] * len(last)
        pad = torch.cat([torch.ones_like(image_tokens[:, :, 0], dtype=torch.bool), token_mask, *ones], dim=1)
        mask, positions = prefix_mask(pad)
        x, _ = self.language(x, mask, positions)
        return self.head(F.dropout(self.norm(x[:, -1]), self.config.dropout, self.training))

    def forward(self, images: Tensor, state: Tensor, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, K, H, W, 3], [B, S], int [B, L], bool [B, L] -> (value [B] in [low, high], bins [B, N])."""
        probabilities = self.read(self.see(images), state, tokens, token_mask).softmax(-1)
        return (probabilities * self.support).sum(-1), probabilities
