"""Physical units <-> what the networks compute with: normalise and pad. Part of every graph."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recap_model.normalize import NormStats
from recap_model.policy.config import PolicyConfig


class Scaling(nn.Module):
    """stats: "state" and "action" statistics of the training data."""

    state_shift: Tensor
    state_scale: Tensor
    action_shift: Tensor
    action_scale: Tensor
    action_gain: Tensor

    def __init__(self, config: PolicyConfig, stats: dict[str, NormStats]) -> None:
        super().__init__()
        self.config = config
        state, action = stats["state"], stats["action"]
        arrays = {
            "state_shift": state.affine(config.state_norm)[0],
            "state_scale": state.affine(config.state_norm)[1],
            "action_shift": action.affine(config.action_norm)[0],
            "action_scale": action.affine(config.action_norm)[1],
            "action_gain": action.gain(config.action_norm),
        }
        for name, array in arrays.items():
            self.register_buffer(name, torch.tensor(array, dtype=torch.float32), persistent=False)

    def state(self, state: Tensor) -> Tensor:
        """[..., S] in physical units -> normalised and padded [..., padded]."""
        return _pad((state - self.state_shift) / self.state_scale, self.config.padded_state)

    def actions(self, actions: Tensor) -> Tensor:
        """[..., A] in physical units -> normalised and padded [..., padded]."""
        return _pad((actions - self.action_shift) / self.action_scale, self.config.padded_action)

    def physical(self, actions: Tensor) -> Tensor:
        """Inverse of `actions`: the padding is cut off."""
        return actions[..., : self.config.action_dim] * self.action_gain + self.action_shift


def _pad(x: Tensor, width: int) -> Tensor:
    """Zeros behind the last dimension up to `width`."""
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def surround(image_tokens: Tensor, special: Tensor | None, config: PolicyConfig) -> Tensor:
    """Put the special tokens around every camera's tokens [B, K * tokens, width], where the model knows them.

    special: embeddings [2, width] of `config.image_tokens`, unscaled as in SmolVLA; None returns the tokens alone.
    Of a missing camera only its special tokens stay: the rest would be masked from everything.
    """
    if special is None:
        return image_tokens
    shape = (image_tokens.shape[0], config.cameras, -1, image_tokens.shape[2])
    opening = special.to(image_tokens.dtype).expand(*shape[:2], 2, -1)
    closing = opening[:, :, :1]
    parts = [torch.cat([opening, image_tokens.reshape(shape), closing], dim=2).flatten(1, 2)]
    parts += [opening[:, 0], closing[:, 0]] * config.empty_cameras
    return torch.cat(parts, dim=1)


def visible(camera_mask: Tensor, config: PolicyConfig) -> Tensor:
    """bool [B, K] (the sample has the camera) -> bool [B, P]: which positions that `surround` returns are seen.

    Of a camera that a sample lacks its special tokens stay, as for the cameras that the whole robot lacks.
    """
    tokens = camera_mask[:, :, None].expand(-1, -1, config.vision.tokens)
    if config.image_tokens is None:
        return tokens.flatten(1)
    around = torch.ones_like(tokens[:, :, :1])
    inside = torch.cat([around, around, tokens, around], dim=2).flatten(1)
    return torch.cat([inside, *[around[:, 0]] * (3 * config.empty_cameras)], dim=1)
