"""The whole circle at the smallest size that still goes through every stage; what the tests run."""

from training.experiment.config import LoopConfig


def loop() -> LoopConfig:
    return LoopConfig(
        name="debug",
        tasks=("button-press-topdown", "drawer-close"),
        model="debug",
        demonstrations=3,
        rollouts=2,
        evaluation=2,
    )
