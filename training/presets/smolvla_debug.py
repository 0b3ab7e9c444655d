"""`smolvla_debug`: the layout of LeRobot's SmolVLA at a size that trains in seconds; what the tests run."""

from dataclasses import replace

from recap_model.policy.config import ExpertConfig, LanguageConfig, SiglipConfig
from training.presets.debug import critic as critic
from training.presets.smolvla_base import optimizer
from training.settings import FitSettings, PolicySettings


def policy() -> PolicySettings:
    return PolicySettings(
        SiglipConfig(image_size=64, width=32, layers=2, heads=2, intermediate=64, shuffle=2, positions="float32"),
        LanguageConfig(width=48, layers=4, heads=3, kv_heads=1, head_dim=16, intermediate=96, head=True),
        ExpertConfig(width=36, intermediate=256),
        FitSettings(steps=40, batch_size=8, save_every=20, log_every=5, optim=replace(optimizer(), lr=1e-3, warmup=10)),
        chunk=8,
        max_tokens=24,
        denoise_steps=3,
        state_width=32,
        action_width=32,
    )
