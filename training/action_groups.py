"""Groups of action dimensions, such as an arm, that the data switches off frame by frame."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from training.columns import LOSS_MASK
from training.distributed import processes
from training.loader import FrameTable
from training.settings import ActionGroup


def parse_groups(texts: Sequence[str]) -> tuple[ActionGroup, ...]:
    """ "left=0:7" -> ActionGroup("left", 0, 7). Raises ValueError."""
    groups = []
    for text in texts:
        name, _, span = text.partition("=")
        start, _, stop = span.partition(":")
        if not (name.isidentifier() and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
            raise ValueError(
                f"--action-groups: expected NAME=START:STOP with START < STOP, as left=0:7 for the dimensions 0 to 6, "
                f"got {text!r}"
            )
        groups.append(ActionGroup(name, int(start), int(stop)))
    taken = [d for group in groups for d in range(group.start, group.stop)]
    if len(set(taken)) != len(taken) or len({group.name for group in groups}) != len(groups):
        raise ValueError(
            f"--action-groups: expected groups with names and dimensions of their own, got {' '.join(texts)}"
        )
    return tuple(groups)


def with_groups(table: FrameTable, groups: Sequence[ActionGroup]) -> FrameTable:
    """The table with `action_mask` made of the columns of `groups`. Dimensions in no group are always learned.

    An action is masked by its own frame, wherever the chunk that it belongs to begins. Raises ValueError for a group
    without a column or beyond the action's dimensions.
    """
    if not groups:
        if table.loss_masks and processes().main:
            print(
                f"note: the data has {', '.join(LOSS_MASK + name for name in sorted(table.loss_masks))}, which nothing "
                "reads without --action-groups"
            )
        return table
    mask = np.ones(table.action.shape, np.bool_)
    for group in groups:
        if group.name not in table.loss_masks:
            raise ValueError(
                f"--action-groups {group.name}: expected a column {LOSS_MASK}{group.name} (1 where the group's actions "
                f"are learned, 0 where not), got {[LOSS_MASK + name for name in sorted(table.loss_masks)]}"
            )
        if group.stop > mask.shape[1]:
            raise ValueError(
                f"--action-groups {group.name}={group.start}:{group.stop}: expected dimensions of an action of "
                f"{mask.shape[1]}, got {group.stop - 1}"
            )
        mask[:, group.start : group.stop] = table.loss_masks[group.name][:, None]
    return replace(table, action_mask=mask)
