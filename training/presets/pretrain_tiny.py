"""`pretrain_tiny`: `tiny` with vectors padded to 32, so that one policy can be trained on several robots and then start
any other of up to 32 dimensions. Its critic is that of `tiny`: a critic is one robot's."""

from dataclasses import replace

from training.presets import tiny
from training.presets.tiny import critic as critic
from training.settings import PolicySettings


def policy() -> PolicySettings:
    return replace(tiny.policy(), state_width=32, action_width=32)
