"""Frames -> batches. The only place where training randomness touches data: order, indicator dropout, image shift.

Everything drawn is a function of (seed, step), so a run resumed at step s sees exactly the batches it would have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    (1 positive, 0 negative, -1 none); target float32 [N]: return, NaN where there is none.
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

    def __len__(self) -> int:
        return len(self.state)


@dataclass(frozen=True)
class Batch:
    """One training batch; shapes as in `recap_model.policy.model`, plus actions [B, T, A], valid [B, T], target [B]."""

    images: NDArray[np.uint8]
    state: NDArray[np.float32]
    tokens: NDArray[np.int32]
    token_mask: NDArray[np.bool_]
    actions: NDArray[np.float32]
    valid: NDArray[np.bool_]
    target: NDArray[np.float32]


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

    def __call__(self, rows: NDArray[np.int64], step: int, *, train: bool = True) -> Batch:
        """Batch for `rows`. train=False: no dropout, no shift."""
        table, rng = self.table, np.random.default_rng([self.seed, step, 1])
        indicator = table.indicator[rows].copy()
        images = table.images[rows]
        if train:
            indicator[rng.random(len(rows)) < self.dropout] = conditioning.NONE
            images = shift_images(images, self.shift, rng)
        steps = rows[:, None] + np.arange(self.chunk)
        valid = steps < table.end[rows][:, None]
        text = (table.task[rows], indicator.astype(np.int64) + 1)
        return Batch(
            images,
            table.state[rows],
            self._tokens[text],
            self._masks[text],
            table.action[np.minimum(steps, table.end[rows][:, None] - 1)],
            valid,
            table.target[rows],
        )


def shift_images(images: NDArray[np.uint8], limit: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Move each frame of uint8 [B, K, H, W, 3] by up to `limit` pixels in both axes, repeating its edge."""
    if limit == 0:
        return images
    batch, cameras, height, width, _ = images.shape
    offsets = rng.integers(-limit, limit + 1, (2, batch, cameras))
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
