"""`debug`: the code path of `tiny` at a size that trains in seconds; what the tests run. It learns next to nothing."""

from dataclasses import replace

from recap_model.policy.config import ConvConfig, ExpertConfig, LanguageConfig
from training.presets import tiny
from training.settings import CriticSettings, PolicySettings


def policy() -> PolicySettings:
    base = tiny.policy()
    return replace(
        base,
        vision=ConvConfig(channels=(8, 16, 16, 32)),
        language=LanguageConfig(width=32, heads=2, kv_heads=1, head_dim=16, intermediate=64),
        expert=ExpertConfig(width=24, intermediate=48),
        denoise_steps=3,
        fit=replace(base.fit, steps=40, batch_size=16, save_every=20, log_every=5),
    )


def critic() -> CriticSettings:
    base = tiny.critic()
    return replace(
        base,
        vision=ConvConfig(channels=(8, 16, 16, 32)),
        language=LanguageConfig(width=32, heads=2, kv_heads=1, head_dim=16, intermediate=64),
        fit=replace(base.fit, steps=40, batch_size=16, save_every=20, log_every=5),
    )
