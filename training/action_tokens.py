"""FAST action tokens, what the backbone learns beside the expert: their ids in the vocabulary, and a batch of them."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recap_model.manifest import read_manifest
from recap_model.normalize import NormStats, normalize
from recap_model.policy.fast_tokenizer import FastTokenizer, load_fast
from recap_model.policy.model import Policy
from training.distributed import processes
from training.loader import Batch, FrameTable
from training.settings import PolicySettings

FOLDER, FILE = "fast", "action_tokens.json"
_BLOCK = 4096


@dataclass(frozen=True)
class ActionTokens:
    """first: vocabulary id of FAST id 0; behind the last one stands the end of the actions. stats: of the actions;
    FAST reads them normalised by quantiles, once, from physical units, whatever the policy's own normalisation is.
    clamped: share of the data's coefficients that lie outside the tokenizer's span.
    """

    fast: FastTokenizer
    first: int
    stats: NormStats
    clamped: float = 0.0

    @property
    def end(self) -> int:
        """Id of the token that ends the actions."""
        return self.first + self.fast.vocabulary_size

    @property
    def count(self) -> int:
        """Ids in use, that of the end included."""
        return self.fast.vocabulary_size + 1

    def __call__(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(ids [B, L], mask [B, L]): the tokens of each chunk and the end; False behind it.

        A chunk that runs past its episode is padded with the last action, as the loader has it: a cosine transform
        cannot leave out frames. A chunk that begins with padding, or in which a group of dimensions is masked,
        teaches nothing here: a token stands for several dimensions at once.
        """
        learned = batch.valid[:, 0]
        if batch.action_mask is not None:
            learned = learned & ~(batch.valid[..., None] & ~batch.action_mask).any((1, 2))
        chunks = normalize(batch.actions, self.stats, "quantile")
        rows = [self.fast.encode(c, outside="clamp") if use else [] for c, use in zip(chunks, learned, strict=True)]
        ids = np.full((len(rows), 1 + max(map(len, rows))), self.end, np.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = np.asarray(tokens, np.int64) + self.first
        lengths = np.array([len(tokens) for tokens in rows])
        return ids, (np.arange(ids.shape[1]) <= lengths[:, None]) & learned[:, None]

    def save(self, folder: Path) -> None:
        """Write the tokenizer and its place in the vocabulary into `folder`, which is made."""
        folder.mkdir()
        self.fast.save(folder)
        place = {"first": self.first, "end": self.end, "tokenizer": fingerprint(self.fast)}
        (folder / FILE).write_text(json.dumps(place, indent=1) + "\n")


def chunk_rows(rows: NDArray[np.int64], end: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Rows of the actions [N, T] of the chunks that begin at `rows`; end: row behind each one's episode."""
    return np.minimum(rows[:, None] + np.arange(length), end[:, None] - 1)


def normalized_chunks(
    action: NDArray[np.float32], end: NDArray[np.int64], stats: NormStats, length: int
) -> Iterator[NDArray[np.float32]]:
    """All chunks of the data as FAST reads them, in blocks [n, T, A]. action [N, A] in physical units, end [N]."""
    normalized = normalize(action, stats, "quantile")
    for start in range(0, len(action), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(action)))
        yield normalized[chunk_rows(rows, end[rows], length)]


def fingerprint(fast: FastTokenizer) -> str:
    """sha256 of everything that decides which ids a chunk gets."""
    text = json.dumps([fast.tokenizer.to_str(), fast.scale, fast.min_token, fast.horizon, fast.action_dim])
    return hashlib.sha256(text.encode()).hexdigest()


def carry(init: Path | None, folder: Path) -> None:
    """Keep the action tokens of the checkpoint that training started from: their weights are still there."""
    if init is not None and (init / FOLDER).is_dir():
        shutil.copytree(init / FOLDER, folder / FOLDER)


def prepare(
    policy: Policy,
    settings: PolicySettings,
    source: Path,
    init: Path | None,
    table: FrameTable,
    stats: NormStats,
    prompt_ids: NDArray[np.int32],
) -> ActionTokens:
    """Give `policy` a vocabulary with the action tokens of the folder `source` and a head that trains.

    stats: the policy's, of its actions. prompt_ids: every id that a prompt of the data has. Raises ValueError.
    """
    config = policy.config
    fast = load_fast(source, horizon=config.chunk, action_dim=config.action_dim)
    known = None if settings.new_robot else _known(init)
    if known is not None:
        _require_same(known, fast, settings, init)
        policy.language.train_head()
        first = int(known["first"])
    else:
        first = _place(policy, fast, settings, init, prompt_ids)
        generator = torch.Generator().manual_seed(settings.fit.seed)
        policy.language.learn_tokens(first, fast.vocabulary_size + 1, generator)
        policy.config = replace(config, language=policy.language.config)
    blocks = normalized_chunks(table.action, table.end, stats, config.chunk)
    outside = sum(fast.outside(fast.coefficients(block)) for block in blocks)
    total = len(table) * config.chunk * config.action_dim
    if outside and processes().main:
        print(
            f"warning: --fast {source}: {outside} of {total} coefficients lie outside {list(fast.span)} and are moved "
            "to its ends; fit a tokenizer on this data (`recap fit-fast`) to lose nothing"
        )
    return ActionTokens(fast, first, stats, outside / total)


def _known(init: Path | None) -> dict[str, Any] | None:
    """Where the checkpoint that training starts from has its action tokens."""
    path = None if init is None else init / FOLDER / FILE
    return json.loads(path.read_text()) if path is not None and path.is_file() else None


def _require_same(known: dict[str, Any], fast: FastTokenizer, settings: PolicySettings, init: Path | None) -> None:
    asked = settings.losses.fast_ids
    if known["tokenizer"] != fingerprint(fast):
        raise ValueError(
            f"--fast: expected the tokenizer that {init} has learned, got another; take --fast {init}/{FOLDER}, or "
            "start from a checkpoint that was trained without action tokens"
        )
    if asked not in (None, known["first"]):
        raise ValueError(
            f"--fast-ids: expected {known['first']}, where {init} has its action tokens, got {asked}; drop it"
        )


def _place(
    policy: Policy, fast: FastTokenizer, settings: PolicySettings, init: Path | None, prompt_ids: NDArray[np.int32]
) -> int:
    """Vocabulary id of the first action token: appended, or where --fast-ids says."""
    size, count, first = policy.config.language.vocabulary, fast.vocabulary_size + 1, settings.losses.fast_ids
    if first is None:
        name = read_manifest(init).parameters.get("vlm_name") if init else None
        if name:
            raise ValueError(
                f"--fast: expected --fast-ids, the first of {count} ids that no prompt uses, since LeRobot makes the "
                f"vocabulary of {size} that {name} has; for SmolVLM2 take 48000; got none"
            )
        return size
    taken = sorted(set(prompt_ids.ravel().tolist()) | set(policy.config.image_tokens or ()))
    clash = [i for i in taken if first <= i < first + count]
    if first < 0 or first + count > size or clash:
        why = f"the ids {clash[:8]} of the prompts" if clash else f"a vocabulary of {size}"
        raise ValueError(
            f"--fast-ids: expected room for {count} ids that no prompt uses, got {first} ... {first + count - 1} and "
            f"{why}; drop it to append them to the vocabulary"
        )
    return first
