"""Frames -> batches. The only place where training randomness touches data: order, indicator dropout, image shift.

Everything drawn is a function of (seed, step), so a run resumed at step s sees exactly the batches it would have seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from recap_client.spec import RobotSpec
from recap_model import conditioning, observation
from recap_model.tokenizer import TextTokenizer


@dataclass(frozen=True)
class FrameTable:
    """All frames of a dataset in memory, in dataset order.

    images uint8 [N, K, H, W, 3]; state float32 [N, S] and action float32 [N, A] in physical units; end int64 [N]: row
    after the last frame of the row's episode; episode int64 [N]; task int64 [N], index into `tasks`; indicator int8 [N]
    (1 positive, 0 negative, -1 none); target float32 [N]: return, NaN where there is none. loss_masks: group of action
    dimensions -> bool [N], False where the group's actions are nothing to learn; action_mask bool [N, A]: the same per
    dimension (`training.action_groups`), None = all are learned. action_is_pad bool [N] (the frame has no action) or
    [N, H] (step h of the chunk that begins at the frame is padding), None = chunks are padded past the episode's end.
    camera_mask bool [N, K]: False where the frame's robot lacks the camera, None = all have all.
    """

    images: NDArray[np.uint8]
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    end: NDArray[np.int64]
    episode: NDArray[np.int64]
    task: NDArray[np.int64]
    tasks: tuple[str, ...]
    indicator: NDArray[np.int8]
    target: NDArray[np.float32]
    loss_masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    action_mask: NDArray[np.bool_] | None = None
    action_is_pad: NDArray[np.bool_] | None = None
    camera_mask: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.state)


@dataclass(frozen=True)
class Part:
    """Micro-batch `index` of `count` that the rows of one optimiser step are cut into (accumulation, processes)."""

    index: int = 0
    count: int = 1

    def of(self, total: int) -> slice:
        """This part's rows of `total`: parts lie in order and differ by at most one row. No part may be empty."""
        if total < self.count:
            raise ValueError(
                f"batch: expected at least one row for each of {self.count} micro-batches (accumulate x processes), "
                f"got {total} rows a step; raise --batch-size, or use fewer micro-batches"
            )
        return slice(total * self.index // self.count, total * (self.index + 1) // self.count)


WHOLE = Part()


@dataclass(frozen=True)
class Batch:
    """One training batch; shapes as in `recap_model.policy.model`, plus actions [B, T, A], valid [B, T], target [B].

    rows: where its B rows lie among the `total` of the optimiser step; total_valid: valid actions in all of them;
    all_targets [total]. action_mask bool [B, T, A]: which entries of the actions are learned, never one that is not
    valid; None = every valid action as a whole. total_entries: how many of them the step has.
    """

    images: NDArray[np.uint8]
    state: NDArray[np.float32]
    tokens: NDArray[np.int32]
    token_mask: NDArray[np.bool_]
    actions: NDArray[np.float32]
    valid: NDArray[np.bool_]
    target: NDArray[np.float32]
    rows: slice
    total: int
    total_valid: int
    all_targets: NDArray[np.float32]
    action_mask: NDArray[np.bool_] | None = None
    total_entries: int = 0
    camera_mask: NDArray[np.bool_] | None = None

    def share(self) -> float:
        """This batch's share of the step's rows: what its mean over rows counts in the mean over all of them."""
        return len(self.state) / self.total

    def valid_share(self) -> float:
        """The same for a mean over valid actions, or over the entries of them that are learned."""
        if self.action_mask is not None:
            return float(self.action_mask.sum()) / max(self.total_entries, 1)
        return float(self.valid.sum()) / max(self.total_valid, 1)


def prepare_episode(
    images: dict[str, NDArray[np.uint8]], state: NDArray[np.float32], robot: RobotSpec
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """An episode's frames through the same checks and stacking as a served observation: [T, K, H, W, 3] and [T, S]."""
    frames = [observation.prepare_images({c: images[c][t] for c in images}, robot) for t in range(len(state))]
    return np.stack(frames), np.stack([observation.prepare_state(row, robot) for row in state])


class Sampler:
    """Batches of frame rows; epochs are permutations that depend on (seed, epoch) alone."""

    def __init__(self, rows: NDArray[np.int64], batch_size: int, seed: int) -> None:
        if not len(rows):
            raise ValueError("training rows: expected at least one frame, got none: is every episode held out?")
        self.rows, self.seed = rows, seed
        self.batch_size = min(batch_size, len(rows))
        self._epoch, self._order = -1, rows

    def __call__(self, step: int) -> NDArray[np.int64]:
        """Rows of batch `step` [batch_size]."""
        per_epoch = len(self.rows) // self.batch_size
        epoch, batch = divmod(step, per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
            self._epoch = epoch
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size]


class Loader:
    """Turns rows of a table into batches.

    dropout: share of samples whose advantage clause is left out, drawn per sample (pi*0.6 appendix F: 0.3).
    shift: each camera's frame is moved by up to this many pixels, edges repeated.
    """

    def __init__(
        self, table: FrameTable, tokenizer: TextTokenizer, *, chunk: int, dropout: float, shift: int, seed: int
    ) -> None:
        self.table, self.chunk, self.dropout, self.shift, self.seed = table, chunk, dropout, shift, seed
        indicators = (conditioning.NONE, conditioning.NEGATIVE, conditioning.POSITIVE)
        pairs = [[tokenizer(conditioning.prompt(task, i)) for i in indicators] for task in table.tasks]
        self._tokens = np.array([[ids for ids, _ in row] for row in pairs])  # [tasks, 3, L]
        self._masks = np.array([[mask for _, mask in row] for row in pairs])
        pad = table.action_is_pad
        if pad is not None and pad.ndim == 2 and pad.shape[1] < chunk:
            raise ValueError(
                f"action_is_pad: expected at least {chunk} steps a frame, the chunk's length, got {pad.shape[1]}; "
                "train with shorter chunks, or drop the column"
            )

    def prompt_ids(self) -> NDArray[np.int32]:
        """Ids of all prompts that batches may hold, in any order."""
        return self._tokens[self._masks]

    def __call__(self, rows: NDArray[np.int64], step: int, *, train: bool = True, part: Part = WHOLE) -> Batch:
        """Batch for `part` of the rows of a step. train=False: no dropout, no shift.

        Everything is drawn for all rows and then cut, so a row meets the same draws however the step is divided.
        """
        table, rng = self.table, np.random.default_rng([self.seed, step, 1])
        total, own = len(rows), part.of(len(rows))
        steps, valid = self._steps(rows)
        mask = None if table.action_mask is None else table.action_mask[steps] & valid[..., None]
        total_valid, total_entries = int(valid.sum()), 0 if mask is None else int(mask.sum())
        all_targets, rows = table.target[rows], rows[own]
        indicator = table.indicator[rows].copy()
        images = table.images[rows]
        if train:
            indicator[rng.random(total)[own] < self.dropout] = conditioning.NONE
            images = shift_images(images, self.shift, rng, own, total)
        text = (table.task[rows], indicator.astype(np.int64) + 1)
        return Batch(
            images,
            table.state[rows],
            self._tokens[text],
            self._masks[text],
            table.action[steps[own]],
            valid[own],
            table.target[rows],
            own,
            total,
            total_valid,
            all_targets,
            None if mask is None else mask[own],
            total_entries,
            None if table.camera_mask is None else table.camera_mask[rows],
        )

    def _steps(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(rows of each chunk's actions [B, T], the episode's last one repeated; which of them are real [B, T])."""
        steps = rows[:, None] + np.arange(self.chunk)
        valid = steps < self.table.end[rows][:, None]
        steps = np.minimum(steps, self.table.end[rows][:, None] - 1)
        pad = self.table.action_is_pad
        if pad is not None:
            valid &= ~(pad[steps] if pad.ndim == 1 else pad[rows][:, : self.chunk])
        return steps, valid


def shift_images(
    images: NDArray[np.uint8],
    limit: int,
    rng: np.random.Generator,
    rows: slice = slice(None),
    total: int | None = None,
) -> NDArray[np.uint8]:
    """Move each frame of uint8 [B, K, H, W, 3] by up to `limit` pixels in both axes, repeating its edge.

    rows, total: the images are those rows of a batch of `total`, whose draws they get.
    """
    if limit == 0:
        return images
    batch, cameras, height, width, _ = images.shape
    offsets = rng.integers(-limit, limit + 1, (2, batch if total is None else total, cameras))[:, rows]
    y = np.clip(np.arange(height) + offsets[0][..., None], 0, height - 1)
    x = np.clip(np.arange(width) + offsets[1][..., None], 0, width - 1)
    b, k = np.arange(batch)[:, None, None, None], np.arange(cameras)[None, :, None, None]
    return images[b, k, y[..., :, None], x[..., None, :]]


def split_episodes(episodes: Sequence[int] | NDArray[np.int64], share: float, seed: int) -> tuple[set[int], set[int]]:
    """(training, held out): whole episodes, at least one of each when there are two or more."""
    unique = np.unique(np.asarray(episodes))
    order = np.random.default_rng([seed, 7]).permutation(unique)
    held = min(max(round(share * len(unique)), 1 if share > 0 else 0), len(unique) - 1)
    return {int(e) for e in order[held:]}, {int(e) for e in order[:held]}
