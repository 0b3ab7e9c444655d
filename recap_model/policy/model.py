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
from recap_model.policy.scaling import Scaling, surround, visible
from recap_model.policy.vision import encode_cameras, make_tower


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

    def __init__(self, config: PolicyConfig, stats: dict[str, NormStats]) -> None:
        """stats: "state" and "action" statistics of the training data."""
        super().__init__()
        self.config = config
        self.scaling = Scaling(config, stats)
        self.vision = make_tower(config.vision, config.language.width, config.frame_size)
        self.language = LanguageModel(config.language)
        self.state_in = nn.Linear(config.padded_state, config.language.width)
        self.expert = ActionExpert(config.expert, config.language, config.padded_action)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """Physical units [B, T, A] -> normalised and padded to the model's width [B, T, padded]."""
        return self.scaling.actions(actions)

    def special_tokens(self) -> Tensor | None:
        """Embeddings [2, width] of what stands around every camera's tokens, or None."""
        return None if self.config.image_tokens is None else self.language.embed.weight[list(self.config.image_tokens)]

    def see(self, images: Tensor) -> Tensor:
        """uint8 [B, K, H, W, 3] -> image tokens [B, K * tokens, width]."""
        return encode_cameras(self.vision, images)

    def embed_prefix(
        self,
        image_tokens: Tensor,
        state: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        camera_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """-> (embeddings [B, P, width], pad bool [B, P]); arguments as for `read`."""
        seen = surround(image_tokens, self.special_tokens(), self.config)
        state_token = self.state_in(self.scaling.state(state))[:, None, :]
        x = torch.cat([seen, self.language.embed_text(tokens), state_token], dim=1)
        is_seen = torch.ones_like(seen[:, :, 0], dtype=torch.bool)
        if camera_mask is not None:
            is_seen = visible(camera_mask, self.config)
        pad = torch.cat([is_seen, token_mask, torch.ones_like(token_mask[:, :1])], dim=1)
        return x, pad

    def read(
        self,
        image_tokens: Tensor,
        state: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        camera_mask: Tensor | None = None,
    ) -> Prefix:
        """image tokens, state [B, S] (physical units), prompt ids [B, L] and mask [B, L] -> Prefix. camera_mask bool
        [B, K]: False where a sample lacks the camera, which nothing attends to then; None = all are there."""
        x, pad = self.embed_prefix(image_tokens, state, tokens, token_mask, camera_mask)
        mask, positions = prefix_mask(pad)
        _, cache = self.language(x, mask, positions, stop=self.expert.depth)
        return Prefix(self.expert.prefix_keys(cache), pad)

    def velocity(self, actions: Tensor, time: Tensor, prefix: Prefix) -> Tensor:
        """Normalised noisy actions [B, T, padded] at time [B] or [B, T] -> velocity [B, T, padded]."""
        return self.expert(actions, time, prefix.keys, prefix.pad)

    def sample_actions(
        self, images: Tensor, state: Tensor, tokens: Tensor, token_mask: Tensor, noise: Tensor
    ) -> Tensor:
        """One chunk per sample, in physical units [B, T, A]. noise [B, T, padded] is an argument, so that every engine
        can be compared with this one exactly."""
        prefix = self.read(self.see(images), state, tokens, token_mask)
        x = flow.integrate(
            lambda x, t: self.velocity(x, torch.full_like(x[:, 0, 0], t), prefix), noise, self.config.denoise_steps
        )
        return self.scaling.physical(x)

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
            pair(image_tokens, image_tokens),
            pair(state, state),
            pair(tokens, unconditional_tokens),
            pair(token_mask, unconditional_mask),
        )

        def guided(x: Tensor, t: float) -> Tensor:
            both = pair(x, x)
            v = self.velocity(both, torch.full_like(both[:, 0, 0], t), prefix)
            conditional, unconditional = v.unflatten(0, (2, -1)).unbind(0)
            return combine(conditional, unconditional, beta[:, None, None])

        x = flow.integrate(guided, noise, self.config.denoise_steps)
        return self.scaling.physical(x)


def pair(first: Tensor, second: Tensor) -> Tensor:
    """Two [B, ...] as one [2B, ...]. Stacked rather than concatenated: torch.export then knows that the sizes are equal
    and keeps the batch dimension symbolic."""
    return torch.stack([first, second]).flatten(0, 1)
