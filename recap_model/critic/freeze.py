"""Which parts of a critic a training leaves as they are."""

from typing import Literal

from torch import nn

from recap_model.critic.model import Critic
from recap_model.policy.siglip import SiglipTower

Freeze = Literal["none", "vision", "all"]


def freeze(critic: Critic, mode: Freeze) -> None:
    """Take gradients from parts of `critic`, in place.

    "vision": the image tower up to its projection to the language model's width. "all": the language model (with its
    embeddings) too, so that the projections of images and state, the readout token and the head are what trains.
    "none": everything trains.
    """
    critic.requires_grad_(True)
    if mode == "none":
        return
    critic.vision.requires_grad_(False)
    for part in _projection(critic):
        part.requires_grad_(True)
    if mode == "all":
        critic.language.requires_grad_(False)


def _projection(critic: Critic) -> tuple[nn.Module | nn.Parameter, ...]:
    """What maps the tower's features to tokens; a convolutional tower's token positions act as its bias."""
    tower = critic.vision
    return (tower.connector,) if isinstance(tower, SiglipTower) else (tower.project, tower.position)
