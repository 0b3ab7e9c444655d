"""What one run of the simulated experiment consists of: tasks, amounts of data, budgets, label rules, arms."""

from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Literal

CONTROLS = ("imitation", "successes", "filtered")


@dataclass(frozen=True)
class Seeds:
    """First environment seeds. Disjoint, so that no evaluation episode has been seen; the same for every arm."""

    demonstrations: int = 0
    rollouts: int = 50_000
    """Of the first iteration; the next ones follow on."""
    evaluation: int = 100_000
    training: int = 0


@dataclass(frozen=True)
class LoopConfig:
    """tasks: names the simulated robot knows. Amounts are episodes per task. Steps are optimiser steps; None takes the
    model preset's. betas: guidance strengths the conditioned policy is evaluated with (1 = none). n to
    failures_negative: the rules of `recap label`."""

    name: str
    tasks: tuple[str, ...]
    model: str
    demonstrations: int
    rollouts: int
    evaluation: int
    intervene: float = 0.35
    policy_steps: int | None = None
    finetune_steps: int | None = None
    critic_steps: int | None = None
    folds: int = 2
    betas: tuple[float, ...] = (1.0, 1.75)
    controls: tuple[str, ...] = ("imitation",)
    """Policies trained on the same data from the same start: "imitation" of all frames, "successes" of successful
    episodes, "filtered" of the positive frames."""
    n: int = 8
    positive_fraction: float = 0.4
    demonstration_fraction: float = 0.3
    interventions: Literal["all", "successes", "computed"] = "all"
    """Which human corrections are positive whatever their advantage (`recap label --interventions`)."""
    threshold_over: Literal["all", "successes"] = "all"
    failures_negative: bool = False
    workers: int = 2
    seeds: Seeds = Seeds()
    finetune: tuple[str, ...] = ()
    """Further options of `recap train policy` for every policy of an iteration, controls included."""
    conditioned: tuple[str, ...] = ()
    """Further options for the conditioned policy alone."""
    collect_beta: float = 1.0
    """Guidance of the policy that collects the second and later iterations' rollouts; the first has none to guide."""
    judge: Literal["service", "probe"] = "service"
    """Evaluations ask a served model, or run the checkpoint in the simulator's process under several prompts."""

    def __post_init__(self) -> None:
        for name in ("demonstrations", "rollouts", "evaluation", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop preset {self.name}: {name}: expected at least 1, got {getattr(self, name)}")
        if 1.0 not in self.betas:
            raise ValueError(f"loop preset {self.name}: betas: expected 1.0 among them, got {self.betas}")
        if self.collect_beta != 1.0 and self.collect_beta not in self.betas:
            raise ValueError(f"loop preset {self.name}: collect_beta: expected one of {self.betas}, got "
                             f"{self.collect_beta}")  # fmt: skip
        unknown = sorted(set(self.controls) - set(CONTROLS))
        if unknown:
            raise ValueError(f"loop preset {self.name}: controls: expected some of {CONTROLS}, got {unknown}")


def with_seed(config: LoopConfig, number: int) -> LoopConfig:
    """The same experiment with other data, training noise and scenes: run `number`, 0 being the preset itself."""
    if not 0 <= number < 50:
        raise ValueError(f"seed: expected a number from 0 to 49 (a thousand scenes each), got {number}")
    s, shift = config.seeds, 1000 * number
    seeds = Seeds(s.demonstrations + shift, s.rollouts + shift, s.evaluation + shift, s.training + number)
    return replace(config, seeds=seeds)


def defaults() -> dict[str, Any]:
    """The settings that have a default, as JSON values."""
    given = {field.name: field.default for field in fields(LoopConfig) if field.default is not MISSING}
    return {name: _plain(value) for name, value in given.items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value
