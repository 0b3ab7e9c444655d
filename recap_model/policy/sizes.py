"""Sizes with a name: the released SmolVLA and what surrounds it. Plain data."""

from recap_model.policy.config import ExpertConfig, LanguageConfig, PolicyConfig, SiglipConfig

SMOLVLM2_500M_VISION = SiglipConfig()
SMOLVLM2_500M_LANGUAGE = LanguageConfig(
    width=960, layers=16, heads=15, kv_heads=5, head_dim=64, intermediate=2560, vocabulary=49280, head=True
)
SMOLVLA_EXPERT = ExpertConfig(width=720, intermediate=2048)


def smolvla_base(cameras: int, state_dim: int, action_dim: int, frame: tuple[int, int] = (512, 512)) -> PolicyConfig:
    """`lerobot/smolvla_base` (450 M parameters) for a robot; frame: (height, width) of its camera frames [px]."""
    return PolicyConfig(
        SMOLVLM2_500M_VISION,
        SMOLVLM2_500M_LANGUAGE,
        SMOLVLA_EXPERT,
        cameras=cameras,
        state_dim=state_dim,
        action_dim=action_dim,
        chunk=50,
        max_tokens=48,
        denoise_steps=10,
        frame=frame,
        state_width=32,
        action_width=32,
    )
