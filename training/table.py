"""Dataset and labels -> the frame table the loader trains from. Frames pass `recap_model.observation` on the way."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.progress import track

from recap_client.spec import RobotSpec, SpecError, require_equal
from recap_model import conditioning
from recap_model.checkpoint import CheckpointFiles
from training.dataset import Dataset, open_dataset
from training.labels import load_labels, load_returns
from training.loader import FrameTable, prepare_episode


@dataclass(frozen=True)
class TableSource:
    """A frame table and what it came from."""

    table: FrameTable
    robot: RobotSpec
    hash: str
    labels_hash: str = ""

    def known_robot(self, files: CheckpointFiles, where: Path) -> RobotSpec:
        """The robot of a checkpoint with the tasks of this data added. Refuses data of another robot, and new tasks
        with words that the checkpoint's tokenizer does not have: the model would read nothing in their place."""
        known = files.spec.robot
        try:
            require_equal(known, self.robot, what=f"dataset against {where}")
        except SpecError as error:
            raise SpecError(f"{error}{_way_out(files, self.robot)}") from error
        new = tuple(task for task in self.table.tasks if task not in known.tasks)
        texts = [conditioning.unconditional_prompt(task) for task in new]
        words = sorted({word for text in texts for word in files.tokenizer.unknown_words(text)})
        if words:
            raise ValueError(
                f"{where}: expected data of tasks in words that it knows, as {list(known.tasks)}, got {list(new)} with "
                f"the new words {words}; train from scratch (without --init) to add words"
            )
        return replace(known, tasks=known.tasks + new)


def load_table(dataset: Path, *, labels: Path | None = None, returns: Path | None = None) -> TableSource:
    """Read all frames of `dataset` into memory, with the indicators of `labels` or the targets of `returns`."""
    data = open_dataset(dataset)
    table, robot = _frames(data)
    if labels is not None:
        marked = load_labels(labels, data)
        return TableSource(replace(table, indicator=marked.indicator.astype(np.int8)), robot, data.hash, marked.hash)
    if returns is not None:
        target = load_returns(returns, data)
        return TableSource(replace(table, target=target.values.astype(np.float32)), robot, data.hash, target.hash)
    return TableSource(table, robot, data.hash)


def frame_size(robot: RobotSpec) -> tuple[int, int]:
    """(height, width) in px of all cameras' frames: one size for all, since they pass the tower as one batch."""
    sizes = {(camera.height, camera.width) for camera in robot.cameras}
    if len(sizes) != 1:
        raise SpecError(
            f"cameras: expected square frames of one size (one size of any shape for presets `smolvla_*`), got "
            f"{_sizes(robot)}; record (or resize) the cameras at one size before ingesting"
        )
    return next(iter(sizes))


def image_side(robot: RobotSpec) -> int:
    """The side in px of all cameras' frames. The convolutional tower takes squares; anything else is refused."""
    height, width = frame_size(robot)
    if height != width or height % 16:
        raise SpecError(
            f"cameras: expected square frames of one size, a multiple of 16 px, got {_sizes(robot)}; "
            "record (or resize) the cameras at one size before ingesting, or train a preset `smolvla_*`, whose image "
            "tower takes any shape"
        )
    return height


def _way_out(files: CheckpointFiles, robot: RobotSpec) -> str:
    """What to do about an imported policy that fits a robot but was given other names, units, limits or rate."""
    known = files.spec.robot
    same = [(len(r.state), len(r.action), [(c.height, c.width) for c in r.cameras]) for r in (known, robot)]
    if files.manifest.parameters.get("format") != "lerobot" or same[0] != same[1]:
        return ""
    return "; import the policy again with this robot's names, units, limits and rate: `recap import-lerobot --dataset`"


def _sizes(robot: RobotSpec) -> str:
    return ", ".join(f"{camera.name} {camera.height}x{camera.width}" for camera in robot.cameras)


def _frames(data: Dataset) -> tuple[FrameTable, RobotSpec]:
    episodes = list(data.episodes)
    tasks = tuple(sorted({episode.task for episode in episodes}))
    robot = replace(data.spec, tasks=tasks)
    total = sum(len(episode.state) for episode in episodes)
    size = frame_size(robot)
    images = np.empty((total, len(robot.cameras), *size, 3), np.uint8)
    states, row = [], 0
    progress: Iterable = track(episodes, "reading frames", disable=total < 2000)  # type: ignore[type-arg]
    for episode in progress:
        frames, state = prepare_episode(episode.images(), episode.state, robot)
        images[row : row + len(state)] = frames
        states.append(state)
        row += len(state)
    lengths = np.array([len(episode.state) for episode in episodes])
    table = FrameTable(
        images=images,
        state=np.concatenate(states),
        action=np.concatenate([e.action for e in episodes]),
        end=np.repeat(lengths.cumsum(), lengths),
        episode=np.repeat([e.index for e in episodes], lengths),
        task=np.repeat([tasks.index(e.task) for e in episodes], lengths),
        tasks=tasks,
        indicator=np.full(total, conditioning.NONE, np.int8),
        target=np.full(total, np.nan, np.float32),
    )
    return table, robot
