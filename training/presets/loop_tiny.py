"""Three tasks that a policy of a million parameters learns in minutes; under an hour on two CPU cores."""

from training.experiment.config import LoopConfig


def loop() -> LoopConfig:
    return LoopConfig(
        name="tiny",
        tasks=("button-press-topdown", "drawer-open", "door-open"),
        model="tiny",
        demonstrations=80,
        rollouts=80,
        evaluation=100,
        policy_steps=2500,
        finetune_steps=2000,
        critic_steps=700,
        n=10,
        controls=("imitation", "filtered"),
        # the scripted human often fails from a state the policy got into; such corrections are nothing to imitate
        interventions="successes",
        # an n-step advantage does not see that an episode failed, except at its end
        threshold_over="successes",
        failures_negative=True,
    )
