"""Dataset and labels -> the frame table the loader trains from. Frames pass `recap_model.observation` on the way."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from recap_client.spec import RobotSpec, SpecError, require_equal
from recap_model import conditioning, observation
from recap_model.checkpoint import CheckpointFiles
from recap_model.spec import PolicySpec, Spec
from training.columns import LOSS_MASK, flags, padding
from training.dataset import Dataset, open_dataset
from training.labels import load_labels, load_returns
from training.loader import FrameTable, prepare_episode
from training.streaming import MEMORY, Frames


@dataclass(frozen=True)
class TableSource:
    """A frame table and what it came from. demonstration bool [N]: the frame's episode was shown by a human."""

    table: FrameTable
    robot: RobotSpec
    hash: str
    labels_hash: str = ""
    demonstration: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))

    def known_robot(self, files: CheckpointFiles, where: Path) -> RobotSpec:
        """The robot of a checkpoint with the tasks of this data added. Refuses data of another robot, and new tasks
        with words that the checkpoint's tokenizer does not have: the model would read nothing in their place."""
        known = files.spec.robot
        try:
            require_equal(known, self.robot, what=f"dataset against {where}")
        except SpecError as error:
            raise SpecError(f"{error}{_way_out(files, self.robot)}") from error
        new = tuple(task for task in self.table.tasks if task not in known.tasks)
        require_known_words(files, {task: conditioning.unconditional_prompt(task) for task in new}, where)
        return replace(known, tasks=known.tasks + new)


def load_table(
    dataset: Path, *, labels: Path | None = None, returns: Path | None = None, frames: Frames = MEMORY
) -> TableSource:
    """Read all frames of `dataset`, with the indicators of `labels` or the targets of `returns`. frames: where the
    images are kept."""
    data = open_dataset(dataset)
    table, robot = read_frames(data, frames)
    shown = np.repeat([e.demonstration for e in data.episodes], [len(e) for e in data.episodes])
    source = TableSource(table, robot, data.hash, demonstration=shown)
    if labels is not None:
        marked = load_labels(labels, data)
        table = replace(table, indicator=marked.indicator.astype(np.int8))
        return replace(source, table=table, labels_hash=marked.hash)
    if returns is not None:
        target = load_returns(returns, data)
        return replace(source, table=replace(table, target=target.values.astype(np.float32)), labels_hash=target.hash)
    return source


def prompted(table: FrameTable, spec: Spec) -> FrameTable:
    """The table with its tasks as they stand in the prompts of the policy of `spec`: what a `Loader` must be given."""
    if not isinstance(spec, PolicySpec):
        return table
    return replace(table, tasks=tuple(spec.text(task) for task in table.tasks))


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


def require_known_words(files: CheckpointFiles, texts: Mapping[str, str], where: Path) -> None:
    """Refuse tasks whose prompt (task -> its text) has words that the checkpoint's tokenizer does not have."""
    words = sorted({word for text in texts.values() for word in files.tokenizer.unknown_words(text)})
    if words:
        raise ValueError(
            f"{where}: expected data of tasks in words that it knows, as {list(files.spec.robot.tasks)}, got "
            f"{list(texts)} with the new words {words}; train from scratch (without --init) to add words"
        )


def _way_out(files: CheckpointFiles, robot: RobotSpec) -> str:
    """What to do about an imported policy that fits a robot but was given other names, units, limits or rate."""
    known = files.spec.robot
    same = [(len(r.state), len(r.action), [(c.height, c.width) for c in r.cameras]) for r in (known, robot)]
    if files.manifest.parameters.get("format") != "lerobot" or same[0] != same[1]:
        return ""
    return "; import the policy again with this robot's names, units, limits and rate: `recap import-lerobot --dataset`"


def _sizes(robot: RobotSpec) -> str:
    return ", ".join(f"{camera.name} {camera.height}x{camera.width}" for camera in robot.cameras)


def read_frames(data: Dataset, frames: Frames = MEMORY, *, show: bool = True) -> tuple[FrameTable, RobotSpec]:
    """The frames of `data` without labels, and its robot with the tasks of these episodes. show: progress bar."""
    episodes = list(data.episodes)
    tasks = tuple(sorted({episode.task for episode in episodes}))
    robot = replace(data.spec, tasks=tasks)
    total = sum(len(episode.state) for episode in episodes)
    size = frame_size(robot)

    def fill(images: NDArray[np.uint8]) -> None:
        row = 0
        progress: Iterable = track(episodes, "reading frames", disable=not show or total < 2000)  # type: ignore[type-arg]
        for episode in progress:
            prepared, _ = prepare_episode(episode.images(), episode.state, robot)
            images[row : row + len(prepared)] = prepared
            row += len(prepared)

    images = frames.images(data.hash, (total, len(robot.cameras), *size, 3), fill)
    lengths = np.array([len(episode.state) for episode in episodes])
    table = FrameTable(
        images=images,
        state=np.stack([observation.prepare_state(row, robot) for e in episodes for row in e.state]),
        action=np.concatenate([e.action for e in episodes]),
        end=np.repeat(lengths.cumsum(), lengths),
        episode=np.repeat([e.index for e in episodes], lengths),
        task=np.repeat([tasks.index(e.task) for e in episodes], lengths),
        tasks=tasks,
        indicator=np.full(total, conditioning.NONE, np.int8),
        target=np.full(total, np.nan, np.float32),
        **_marks(data),
    )
    return table, robot


def _marks(data: Dataset) -> dict[str, Any]:
    """What the data says must not be learned: masks of groups of action dimensions, and padding."""

    def whole(name: str) -> NDArray[Any]:
        return np.concatenate([episode.extra[name] for episode in data.episodes])

    names = tuple(data.episodes[0].extra) if data.episodes else ()
    masks = {name.removeprefix(LOSS_MASK): flags(name, whole(name)) for name in names if name.startswith(LOSS_MASK)}
    pad = padding(whole("action_is_pad")) if "action_is_pad" in names else None
    return {"loss_masks": masks, "action_is_pad": pad}
