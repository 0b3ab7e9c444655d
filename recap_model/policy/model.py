"""The SmolVLA-family policy: physical units in, physical units out; normalisation is part of the graph."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recap_model.guidance import combine
from recap_model.normalize import NormStats
from recap_model.policy import flow
from recap_model.policy.config import PolicyConfig
from recap_model.policy.expert import ActionExpert
from recap_model.policy.language import KeyValues, LanguageModel, prefix_mask
from recap_model.policy.vision import ConvTower, encode_cameras


@dataclass(frozen=True)
class Prefix:
    """What the action expert needs of an observation: keys and values per layer, and which positions are real."""

    keys: KeyValues
    pad: Tensor  # bool [B, P]

    def repeat(self, times: int) -> "Prefix":
        """Every sample `times` times, neighbours together."""
        keys = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self.keys]
        return Prefix(keys, self.pad.repeat_interleave(times, 0))


class Policy(nn.Module):
    """Vision tower, prefix transformer, action expert."""

    state_shift: Tensor
    state_scale: Tensor
    action_shift: Tensor
    action_scale: Tensor

    def __init__(self, config: PolicyConfig, stats: dict[str, NormStats]) -> None:
        """stats: "state" and "action" statistics of the training data."""
        super().__init__()
        self.config = config
        self.vision = ConvTower(config.vision, config.language.width)
        self.language = LanguageModel(config.language)
        self.state_in = nn.Linear(config.state_dim, config.language.width)
        self.expert = ActionExpert(config.expert, config.language, config.action_dim)
        modes = {"state": config.state_norm, "action": config.action_norm}
        for name, mode in modes.items():
            shift, scale = stats[name].affine(mode)
            self.register_buffer(f"{name}_shift", torch.tensor(shift, dtype=torch.float32), persistent=False)
            self.register_buffer(f"{name}_scale", torch.tensor(scale, dtype=torch.float32), persistent=False)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        return (actions - self.action_shift) / self.action_scale

    def see(self, images: Tensor) -> Tensor:
        """uint8 [B, K, H, W, 3] -> image tokens [B, K * tokens, width]."""
        return encode_cameras(self.vision, images)

    def read(self, image_tokens: Tensor, state: Tensor, tokens: Tensor, token_mask: Tensor) -> Prefix:
        """image tokens, state [B, S] (physical units), prompt ids [B, L] and mask [B, L] -> Prefix."""
        state_token = self.state_in((state - self.state_shift) / self.state_scale)[:, None, :]
        x = torch.cat([image_tokens, self.language.embed_text(tokens), state_token], dim=1)
        seen = torch.ones_like(image_tokens[:, :, 0], dtype=torch.bool)
        pad = torch.cat([seen, token_mask, torch.ones_like(token_mask[:, :1])], dim=1)
        mask, positions = prefix_mask(pad)
        _, cache = self.language(x, mask, positions, full=False)
        return Prefix(self.expert.prefix_keys(cache), pad)

    def velocity(self, actions: Tensor, time: Tensor, prefix: Prefix) -> Tensor:
        """Normalised noisy actions [B, T, A] at time [B] -> velocity [B, T, A]."""
        return self.expert(actions, time, prefix.keys, prefix.pad)

    def sample_actions(
        self, images: Tensor, state: Tensor, tokens: Tensor, token_mask: Tensor, noise: Tensor
    ) -> Tensor:
        """One chunk per sample, in physical units [B, T, A]. noise [B, T, A] is an argument, so that every engine can
        be compared with this one exactly."""
        prefix = self.read(self.see(images), state, tokens, token_mask)
        x = flow.integrate(
            lambda x, t: self.velocity(x, torch.full_like(x[:, 0, 0], t), prefix), noise, self.config.denoise_steps
        )
        return x * self.action_scale + self.action_shift

    def sample_actions_guided(
        self,
        images: Tensor,
        state: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        unconditional_tokens: Tensor,
        unconditional_mask: Tensor,
        beta: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """As `sample_actions` with guidance beta [B]: both branches as one batch that shares the image tokens."""
        image_tokens = self.see(images)
        prefix = self.read(
            _pair(image_tokens, image_tokens),
            _pair(state, state),
            _pair(tokens, unconditional_tokens),
            _pair(token_mask, unconditional_mask),
        )

        def guided(x: Tensor, t: float) -> Tensor:
            both = _pair(x, x)
            v = self.velocity(both, torch.full_like(both[:, 0, 0], t), prefix)
            conditional, unconditional = v.unflatten(0, (2, -1)).unbind(0)
            return combine(conditional, unconditional, beta[:, None, None])

        x = flow.integrate(guided, noise, self.config.denoise_steps)
        return x * self.action_scale + self.action_shift


def _pair(first: Tensor, second: Tensor) -> Tensor:
    """Two [B, ...] as one [2B, ...]. Stacked rather than concatenated: torch.export then knows that the sizes are equal
    and keeps the batch dimension symbolic."""
    return torch.stack([first, second]).flatten(0, 1)
