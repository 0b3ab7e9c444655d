"""The plan of a run: every stage is one `recap` command with the folders it reads and writes.

Paths are relative to the run's folder, where the commands are run, so that a run can be moved and any stage repeated by
hand. `{policy_url}` and `{value_url}` stand for the services that a stage needs.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from training.experiment.config import LoopConfig


@dataclass(frozen=True)
class Serve:
    """Services a stage needs: models (repository), beta (guidance strength), critic: also the value service."""

    models: str
    beta: float = 1.0
    critic: bool = False


@dataclass(frozen=True)
class Stage:
    """command: arguments of `recap`; inputs, outputs: paths relative to the run; serve: services it needs."""

    name: str
    command: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    serve: Serve | None = None


@dataclass(frozen=True)
class Arm:
    """One evaluated policy. folder: where its evaluation lies; iteration: of the loop; beta: guidance strength."""

    name: str
    iteration: int
    beta: float
    folder: str
    checkpoint: str


def plan(config: LoopConfig, iterations: int) -> tuple[Stage, ...]:
    """All stages in order. Raises ValueError for fewer than one iteration."""
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    stages = [*_bootstrap(config)]
    for k in range(1, iterations + 1):
        stages += _iteration(config, k)
    # a probe's output holds a folder for every arm
    evaluated = dict.fromkeys("/".join(arm.folder.split("/")[:2]) for arm in arms(config, iterations))
    shown = [*evaluated] + [f"{k}/advantage" for k in range(1, iterations + 1)]
    stages.append(Stage("report", ("report", "--run", "."), tuple(shown), ("report.html",)))
    return tuple(stages)


def arms(config: LoopConfig, iterations: int) -> tuple[Arm, ...]:
    """Every evaluated policy, in order of evaluation."""
    if config.judge == "probe":
        return tuple(_probed_arms(config, iterations))
    found = [Arm("sft", 0, 1.0, "0/evaluation-sft", "0/sft")]
    for k in range(1, iterations + 1):
        found += [Arm("recap", k, beta, f"{k}/evaluation-{_arm(beta)}", f"{k}/recap") for beta in config.betas]
        found += [Arm(name, k, 1.0, f"{k}/evaluation-{name}", f"{k}/{name}") for name in config.controls]
    return tuple(found)


def _probed_arms(config: LoopConfig, iterations: int) -> Iterator[Arm]:
    """As `arms`, and the conditioned policy told `negative`, and told nothing."""
    yield Arm("sft", 0, 1.0, "0/probe-sft/positive", "0/sft")
    for k in range(1, iterations + 1):
        for beta in config.betas:
            folder = "positive" if beta == 1.0 else f"positive-beta-{beta:g}"
            yield Arm("recap", k, beta, f"{k}/probe-recap/{folder}", f"{k}/recap")
        for prompt in ("negative", "none"):
            yield Arm(f"recap-{prompt}", k, 1.0, f"{k}/probe-recap/{prompt}", f"{k}/recap")
        for name in config.controls:
            yield Arm(name, k, 1.0, f"{k}/probe-{name}/positive", f"{k}/{name}")


def describe(config: LoopConfig, iterations: int) -> dict[str, Any]:
    """The run as JSON (`loop.json`): configuration, arms, and where every stage's output lies."""
    return {
        "config": asdict(config),
        "iterations": iterations,
        "arms": [asdict(arm) for arm in arms(config, iterations)],
        "stages": [asdict(stage) for stage in plan(config, iterations)],
    }


def _bootstrap(config: LoopConfig) -> Iterator[Stage]:
    """Iteration 0: demonstrations, a first critic, and plain imitation as the policy to start from."""
    yield Stage("0 collect", (*_collect(config, config.demonstrations, config.seeds.demonstrations, "0/demonstrations"),
                              "--demonstrations"), (), ("0/demonstrations",))  # fmt: skip
    yield from _data(0, ("0/demonstrations",))
    yield _critic(config, 0, folds=1)
    yield _policy(config, "0 sft", "0/sft", 0, "imitation", config.policy_steps)
    yield _export("0 export", "0/models", ("0/sft", "0/critic"))
    if config.judge == "probe":
        yield _probe(config, "0 probe sft", "0/sft", "0/probe-sft")
    else:
        yield _evaluate(config, arms(config, 1)[0], "0/models")


def _iteration(config: LoopConfig, k: int) -> Iterator[Stage]:
    """Experience of the last policy -> labels -> two policies from the same start, with and without the indicator."""
    last = f"{k - 1}/models"
    first = config.seeds.rollouts + (k - 1) * config.rollouts
    collect = _collect(config, config.rollouts, first, f"{k}/rollouts")
    yield Stage(
        f"{k} collect",
        (*collect, "--policy-url", "{policy_url}", "--value-url", "{value_url}", "--intervene", str(config.intervene)),
        (last,),
        (f"{k}/rollouts",),
        Serve(last, config.collect_beta if k > 1 else 1.0, critic=True),
    )
    yield from _data(k, ("0/demonstrations", *(f"{i}/rollouts" for i in range(1, k + 1))))
    # from scratch: a critic started from iteration 0's would have seen the episodes that a fold holds out
    yield _critic(config, k, folds=config.folds)
    yield Stage(
        f"{k} label",
        ("label", "--dataset", f"{k}/dataset", "--returns", f"{k}/returns", "--values", f"{k}/values", "--out",
         f"{k}/advantage", *_label_rules(config)),
        (f"{k}/dataset", f"{k}/returns", f"{k}/values"),
        (f"{k}/advantage",),
    )  # fmt: skip
    yield from _policies(config, k)
    guided = ("--guided",) if any(beta != 1.0 for beta in config.betas) else ()
    yield _export(f"{k} export", f"{k}/models", (f"{k}/recap", f"{k}/critic"), *guided)
    if config.judge == "probe":
        yield _probe(config, f"{k} probe recap", f"{k}/recap", f"{k}/probe-recap", config.betas, ("negative", "none"))
        for name in config.controls:
            yield _probe(config, f"{k} probe {name}", f"{k}/{name}", f"{k}/probe-{name}")
        return
    for name in config.controls:
        yield _export(f"{k} export {name}", f"{k}/models-{name}", (f"{k}/{name}",))
    for arm in arms(config, k):
        if arm.iteration == k:
            yield _evaluate(config, arm, f"{k}/models" if arm.name == "recap" else f"{k}/models-{arm.name}")


def _policies(config: LoopConfig, k: int) -> Iterator[Stage]:
    """All from the policy of iteration 0, on the same data, steps and seed: only what the labels do differs."""
    steps, options = config.finetune_steps, config.finetune
    labels = {"recap": f"{k}/advantage", "filtered": f"{k}/advantage", "successes": f"{k}/outcomes"}
    yield _policy(config, f"{k} recap", f"{k}/recap", k, "recap", steps, "0/sft", labels["recap"],
                  (*options, *config.conditioned))  # fmt: skip
    if "successes" in config.controls:
        yield Stage(
            f"{k} label outcomes",
            ("label", "--dataset", f"{k}/dataset", "--returns", f"{k}/returns", "--values", f"{k}/values", "--out",
             f"{k}/outcomes", "--mode", "outcome"),
            (f"{k}/dataset", f"{k}/returns", f"{k}/values"),
            (f"{k}/outcomes",),
        )  # fmt: skip
    for name in config.controls:
        mode = "imitation" if name == "imitation" else "filtered"
        yield _policy(config, f"{k} {name}", f"{k}/{name}", k, mode, steps, "0/sft", labels.get(name, ""), options)


def _label_rules(config: LoopConfig) -> tuple[str, ...]:
    share = ("--n", str(config.n), "--positive-fraction", str(config.positive_fraction), "--demonstration-fraction",
             str(config.demonstration_fraction))  # fmt: skip
    over = ("--threshold-over", config.threshold_over) if config.threshold_over != "all" else ()
    failed = ("--failures-negative",) if config.failures_negative else ()
    return (*share, *over, "--interventions", config.interventions, *failed)


def _collect(config: LoopConfig, episodes: int, first_seed: int, out: str) -> tuple[str, ...]:
    return ("collect", "--tasks", *config.tasks, "--episodes-per-task", str(episodes), "--first-seed", str(first_seed),
            "--workers", str(config.workers), "--out", out)  # fmt: skip


def _data(k: int, rollouts: tuple[str, ...]) -> Iterator[Stage]:
    yield Stage(
        f"{k} ingest", ("ingest", "--rollouts", *rollouts, "--out", f"{k}/dataset"), rollouts, (f"{k}/dataset",)
    )
    yield Stage(f"{k} returns", ("returns", "--dataset", f"{k}/dataset", "--out", f"{k}/returns"), (f"{k}/dataset",),
                (f"{k}/returns",))  # fmt: skip


def _critic(config: LoopConfig, k: int, *, folds: int) -> Stage:
    command = ("train", "critic", "--preset", config.model, "--dataset", f"{k}/dataset", "--returns", f"{k}/returns",
               "--out", f"{k}/critic", "--values-out", f"{k}/values", "--folds", str(folds))  # fmt: skip
    return Stage(f"{k} critic", command + _budget(config, config.critic_steps), (f"{k}/dataset", f"{k}/returns"),
                 (f"{k}/critic", f"{k}/values"))  # fmt: skip


def _policy(
    config: LoopConfig, name: str, out: str, k: int, mode: str, steps: int | None, init: str = "", labels: str = "",
    options: tuple[str, ...] = (),
) -> Stage:  # fmt: skip
    command: tuple[str, ...] = ("train", "policy", "--preset", config.model, "--dataset", f"{k}/dataset", "--mode",
                                mode, "--out", out)  # fmt: skip
    command += (("--labels", labels) if labels else ()) + (("--init", init) if init else ())
    inputs = tuple(path for path in (f"{k}/dataset", labels, init) if path)
    return Stage(name, command + _budget(config, steps) + options, inputs, (out,))


def _probe(config: LoopConfig, name: str, checkpoint: str, out: str, betas: tuple[float, ...] = (1.0,),
           prompts: tuple[str, ...] = ()) -> Stage:  # fmt: skip
    what = ("--prompts", "positive", *prompts, "--betas", *(f"{beta:g}" for beta in betas))
    where = ("--tasks", *config.tasks, "--episodes-per-task", str(config.evaluation), "--first-seed",
             str(config.seeds.evaluation), "--workers", str(config.workers))  # fmt: skip
    command = ("probe", checkpoint, "--out", out, *what, *where)
    return Stage(name, command, (checkpoint,), (out,))


def _budget(config: LoopConfig, steps: int | None) -> tuple[str, ...]:
    return ("--seed", str(config.seeds.training)) + (("--steps", str(steps)) if steps else ())


def _export(name: str, out: str, checkpoints: tuple[str, ...], *options: str) -> Stage:
    return Stage(name, ("export", *checkpoints, "--out", out, *options), checkpoints, (out,))


def _evaluate(config: LoopConfig, arm: Arm, models: str) -> Stage:
    command = ("evaluate", "--policy-url", "{policy_url}", "--tasks", *config.tasks, "--episodes-per-task",
               str(config.evaluation), "--first-seed", str(config.seeds.evaluation), "--workers", str(config.workers),
               "--out", arm.folder)  # fmt: skip
    name = f"{arm.iteration} evaluate {arm.folder.partition('evaluation-')[2]}"
    return Stage(name, command, (models,), (arm.folder,), Serve(models, arm.beta))


def _arm(beta: float) -> str:
    return "recap" if beta == 1.0 else f"recap-beta-{beta:g}"
