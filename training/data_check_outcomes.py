"""Checks of what the columns say about an episode: outcomes that contradict each other, flags, tasks never solved."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from training import columns
from training.columns import DatasetError
from training.data_check_files import Loose, Problem, shorten


def outcome_problems(loose: Loose) -> Iterator[Problem]:
    """Outcome columns that are no outcome, contradict each other, or are not there; then tasks without a success."""
    result, problems = _outcomes(loose)
    yield from problems
    if not loose.runs:
        return
    unknown = [index for (index, _), outcome in zip(loose.runs, result, strict=True) if outcome is None]
    if len(unknown) == len(loose.runs) and not problems:
        text = (
            f"no episode has an outcome: expected one of the columns {', '.join(columns.OUTCOME_COLUMNS)}; "
            "`recap returns` needs --all-successful"
        )
        yield Problem("warning", "outcome", text)
        return
    if unknown and not problems:
        text = (
            f"{len(unknown)} of {len(loose.runs)} episodes have no outcome: {shorten(unknown)}; `recap returns` refuses"
        )
        yield Problem("warning", "outcome", text)
    yield from _unsolved(loose, result)


def _outcomes(loose: Loose) -> tuple[list[bool | None], list[Problem]]:
    """(outcome of every run, None where unknown or in doubt; what is wrong with them)."""
    result: list[bool | None] = []
    problems: list[Problem] = []
    start = np.zeros(1, np.int64)
    for number, (index, rows) in enumerate(loose.runs):
        found: dict[str, list[bool | None]] = {}
        for name in columns.OUTCOME_COLUMNS:
            try:
                if name in loose.columns:
                    found[name] = columns.frame_outcomes(name, loose.columns[name][rows], start)
                if name in loose.table and len(loose.table[name]) == len(loose.runs):
                    whole = columns.episode_outcomes(name, loose.table[name][number : number + 1])
                    found[f"meta/episodes {name}"] = whole
            except DatasetError as error:
                problems.append(Problem("error", "outcome", _text(error), index, name))
        try:
            (outcome,) = columns.agree(found, 1)
            result.append(_labelled(loose, rows) if outcome is None else outcome)
        except DatasetError as error:
            problems.append(Problem("error", "outcome", _text(error), index))
            result.append(None)
    return result, problems


def _labelled(loose: Loose, rows: slice) -> bool | None:
    """The outcome as `training.labels.known_outcomes` reads it from a column of openpi forks."""
    values = loose.columns.get("value_label")
    return columns.labelled_outcome(None if values is None or values.dtype.kind != "f" else values[rows])


def _text(error: DatasetError) -> str:
    return str(error).removeprefix("episode 0: ")


def _unsolved(loose: Loose, result: list[bool | None]) -> Iterator[Problem]:
    """Tasks that no episode solves: returns are -1 throughout, and a critic learns nothing about progress from them."""
    task = loose.columns.get("task_index")
    if task is None or loose.tasks is None or task.dtype == object:
        return
    wins: dict[int, list[bool]] = defaultdict(list)
    for (_, rows), outcome in zip(loose.runs, result, strict=True):
        if outcome is not None:
            wins[int(task[rows.start])].append(outcome)
    for number, outcomes in sorted(wins.items()):
        if not any(outcomes):
            name = loose.tasks.get(number, f"number {number}")
            text = f"task {name!r}: none of {len(outcomes)} episodes succeeds: all its returns are -1"
            yield Problem("warning", "no success", text)


def flag_problems(loose: Loose) -> Iterator[Problem]:
    """0/1 columns that hold something else, and demonstration flags that change within an episode."""
    for name in ("intervention", "demonstration"):
        if name not in loose.columns:
            continue
        try:
            flags = columns.flags(name, loose.columns[name])
        except DatasetError as error:
            yield Problem("error", "flags", str(error), column=name)
            continue
        for index, rows in loose.runs if name == "demonstration" else ():
            if flags[rows].any() and not flags[rows].all():
                text = f"expected 0 or 1 on all frames, got 1 on {int(flags[rows].sum())} of {len(flags[rows])}"
                yield Problem("warning", "flags", text, index, name)
