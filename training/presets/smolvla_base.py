"""`smolvla_base`: the sizes and the optimiser of `lerobot/smolvla_base` (450 M parameters); wants a CUDA device.

From scratch it learns little from one robot's data: start from an imported checkpoint with --init (docs/lerobot.md).
Its critic is that of `tiny`.
"""

from recap_model.policy.sizes import SMOLVLA_EXPERT, SMOLVLM2_500M_LANGUAGE, SMOLVLM2_500M_VISION
from training.optim import OptimConfig
from training.presets.tiny import critic as critic
from training.settings import FitSettings, PolicySettings


def optimizer() -> OptimConfig:
    """LeRobot's `SmolVLAConfig`: decay to 2.5e-6, and no moving average."""
    return OptimConfig(lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=1e-10, clip=10.0, warmup=1000, final=0.025, ema=0.0)


def policy() -> PolicySettings:
    return PolicySettings(
        SMOLVLM2_500M_VISION,
        SMOLVLM2_500M_LANGUAGE,
        SMOLVLA_EXPERT,
        FitSettings(steps=20_000, optim=optimizer()),
        chunk=50,
        max_tokens=48,
        denoise_steps=10,
        draws=1,
        state_width=32,
        action_width=32,
    )
