"""`tiny`: under a million parameters, 64 px, trains in minutes on two CPU cores."""

from recap_model.policy.config import ConvConfig, ExpertConfig, LanguageConfig
from training.optim import OptimConfig
from training.settings import CriticSettings, FitSettings, PolicySettings


def policy() -> PolicySettings:
    return PolicySettings(
        ConvConfig(), LanguageConfig(), ExpertConfig(), FitSettings(steps=3000, optim=OptimConfig(lr=1e-3))
    )


def critic() -> CriticSettings:
    return CriticSettings(
        ConvConfig(channels=(24, 32, 48, 96)),
        LanguageConfig(width=96, heads=4, kv_heads=4, head_dim=24, intermediate=256),
        FitSettings(steps=700, optim=OptimConfig(lr=1e-3, weight_decay=0.05)),
    )
