"""What one run of the simulated experiment consists of: tasks, amounts of data, budgets, label rules, arms."""

from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any, Literal


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
    """Policies trained on the same data from the same start: "imitation" of all frames, "filtered" of the positive."""
    n: int = 8
    positive_fraction: float = 0.4
    demonstration_fraction: float = 0.3
    interventions: Literal["all", "successes", "computed"] = "all"
    """Which human corrections are positive whatever their advantage (`recap label --interventions`)."""
    threshold_over: Literal["all", "successes"] = "all"
    failures_negative: bool = False
    workers: int = 2
    seeds: Seeds = Seeds()

    def __post_init__(self) -> None:
        for name in ("demonstrations", "rollouts", "evaluation", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop preset {self.name}: {name}: expected at least 1, got {getattr(self, name)}")
        if 1.0 not in self.betas:
            raise ValueError(f"loop preset {self.name}: betas: expected 1.0 among them, got {self.betas}")


def defaults() -> dict[str, Any]:
    """The settings that have a default, as JSON values."""
    given = {field.name: field.default for field in fields(LoopConfig) if field.default is not MISSING}
    return {name: _plain(value) for name, value in given.items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value
