"""`pretrain_debug`: the code path of `pretrain_tiny` at a size that trains in seconds; what the tests run."""

from dataclasses import replace

from training.presets import debug
from training.presets.debug import critic as critic
from training.settings import PolicySettings


def policy() -> PolicySettings:
    return replace(debug.policy(), state_width=32, action_width=32)
