"""The advantage-conditioned prompt: the only place that spells it (pi*0.6 section V-B, DESIGN 2.3).

The clause stands after the task and before the actions, so that only the likelihood of actions depends on it.
Training draws the dropout in `training/loader.py`; services call `positive_prompt` and nothing else.
"""

from collections.abc import Sequence

POSITIVE = 1
NEGATIVE = 0
NONE = -1

_CLAUSE = {POSITIVE: "Advantage: positive\n", NEGATIVE: "Advantage: negative\n", NONE: ""}


def prompt(task: str, indicator: int) -> str:
    """The text the policy reads. indicator: 1 positive, 0 negative, -1 no clause (dropped or unlabelled)."""
    if indicator not in _CLAUSE:
        raise ValueError(f"indicator: expected 1 (positive), 0 (negative) or -1 (none), got {indicator!r}")
    return f"{task.strip()}\n{_CLAUSE[indicator]}"


def with_names(task: str, state: Sequence[str], action: Sequence[str]) -> str:
    """The task, and what the robot's numbers are called. It takes the task's place in `prompt` for a policy trained
    with `--names-in-prompt`, which can then tell several robots apart."""
    return f"{task.strip()}\nState: {', '.join(state)}\nAction: {', '.join(action)}"


def positive_prompt(task: str) -> str:
    """What every robot is served with."""
    return prompt(task, POSITIVE)


def unconditional_prompt(task: str) -> str:
    """The second branch of classifier-free guidance; also what the critic reads."""
    return prompt(task, NONE)
