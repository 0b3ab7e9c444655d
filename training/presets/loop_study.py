"""One run of the study in docs/results.md: RECAP against every honest control. `--seed` gives the others."""

from training.experiment.config import LoopConfig


def loop() -> LoopConfig:
    return LoopConfig(
        name="study",
        tasks=("button-press-topdown", "drawer-open", "door-open"),
        model="tiny",
        demonstrations=50,
        rollouts=50,
        evaluation=40,
        policy_steps=2000,
        finetune_steps=4000,
        critic_steps=600,
        n=10,
        betas=(1.0, 2.0, 5.0),
        collect_beta=2.0,
        controls=("imitation", "successes", "filtered"),
        interventions="successes",
        threshold_over="successes",
        failures_negative=True,
        # every policy keeps the image tower of the first one: a third faster, and the same for all
        finetune=("--train", "no-vision"),
        conditioned=("--positive-share", "0.6"),
        judge="probe",
        workers=1,
    )
