"""Three tasks that a policy of a million parameters learns in minutes; under an hour on two CPU cores."""

from training.experiment.config import LoopConfig


def loop() -> LoopConfig:
    return LoopConfig(
        name="tiny",
        tasks=("button-press-topdown", "drawer-open", "door-open"),
        model="tiny",
        demonstrations=60,
        rollouts=60,
        evaluation=100,
        policy_steps=2400,
        finetune_steps=1200,
        critic_steps=600,
    )
