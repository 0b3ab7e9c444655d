"""Small seeded models, data and checkpoints for tests: the real classes at debug size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim
from recap_model.critic.config import CriticConfig
from recap_model.critic.model import Critic
from recap_model.manifest import publish, write_manifest
from recap_model.normalize import NormStats
from recap_model.policy.config import ExpertConfig, LanguageConfig, PolicyConfig, SiglipConfig
from recap_model.policy.model import Policy
from recap_model.spec import CriticSpec, PolicySpec
from recap_model.tokenizer import word_tokenizer
from training.checkpoint import write_checkpoint
from training.loader import FrameTable
from training.presets import debug

TASKS = ("open the door", "open the drawer")
ROBOT = RobotSpec(
    "test",
    (Camera("front", 64, 64), Camera("top", 64, 64)),
    tuple(StateDim(n, "m") for n in ("x", "y", "z")),
    tuple(ActionDim(n, "1", -1, 1) for n in ("dx", "dy", "dz", "grip")),
    20.0,
    TASKS,
)
TOKENIZER = word_tokenizer(TASKS, 16)
_RNG = np.random.default_rng(5)
STATS = {
    "state": NormStats.of(_RNG.normal(2.0, 3.0, (50, 3))),
    "action": NormStats.of(_RNG.normal(0.2, 0.5, (50, 4))),
}


SMOLVLA = PolicyConfig(
    SiglipConfig(image_size=64, width=32, layers=2, heads=2, intermediate=64, shuffle=2),
    LanguageConfig(width=48, layers=4, heads=4, kv_heads=2, head_dim=16, intermediate=64, vocabulary=24),
    ExpertConfig(width=36, intermediate=64), cameras=2, state_dim=3, action_dim=4, chunk=8, max_tokens=16,
    denoise_steps=5, frame=(64, 64), state_width=8, action_width=6,
)  # fmt: skip
"""The kinds of layers of the real SmolVLA, for the robot and the tokenizer of this module."""


def make_policy(seed: int = 0) -> Policy:
    """An untrained policy whose output layer is far from zero, so that differences show."""
    settings = debug.policy()
    language = replace(settings.language, vocabulary=24)
    config = PolicyConfig(settings.vision, language, settings.expert, 2, 3, 4, chunk=8, max_tokens=16, denoise_steps=3)
    torch.manual_seed(seed)
    policy = Policy(config, STATS)
    # From scratch the prompt hardly matters; stronger embeddings make every dependence measurable.
    torch.nn.init.normal_(policy.language.embed.weight, std=0.5)
    return policy.eval()


def make_critic(seed: int = 0) -> Critic:
    settings = debug.critic()
    config = CriticConfig(settings.vision, replace(settings.language, vocabulary=24), 2, 3, max_tokens=16)
    torch.manual_seed(seed)
    return Critic(config, STATS).eval()


def save_policy(folder: Path, seed: int = 0) -> Path:
    policy = make_policy(seed)
    with publish(folder) as tmp:
        weights = {k: v.detach() for k, v in policy.named_parameters()}
        write_checkpoint(tmp, weights, policy.config.to_json(), PolicySpec(ROBOT, 8, 16), TOKENIZER, STATS)
        write_manifest(tmp, "policy")
    return folder


def save_critic(folder: Path, seed: int = 0) -> Path:
    critic = make_critic(seed)
    with publish(folder) as tmp:
        weights = {k: v.detach() for k, v in critic.named_parameters()}
        spec = CriticSpec(ROBOT, 16, 201, -1.0, 0.0, dict.fromkeys(TASKS, 60.0))
        write_checkpoint(tmp, weights, critic.config.to_json(), spec, TOKENIZER, STATS)
        write_manifest(tmp, "critic")
    return folder


def inputs(batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded inputs of `Policy.sample_actions`, with positive prompts."""
    rng = np.random.default_rng([seed, batch])
    text = [TOKENIZER(f"{TASKS[i % 2]}\nAdvantage: positive\n") for i in range(batch)]
    return {
        "images": torch.from_numpy(rng.integers(0, 256, (batch, 2, 64, 64, 3), np.uint8)),
        "state": torch.from_numpy(rng.normal(2, 3, (batch, 3)).astype(np.float32)),
        "tokens": torch.from_numpy(np.stack([ids for ids, _ in text])),
        "token_mask": torch.from_numpy(np.stack([mask for _, mask in text])),
        "noise": torch.from_numpy(rng.normal(size=(batch, 8, 4)).astype(np.float32)),
    }


def make_table(lengths: tuple[int, ...] = (5, 12, 30), seed: int = 0) -> FrameTable:
    """A frame table with random content; episode i has lengths[i] frames; the first episode failed."""
    rng = np.random.default_rng(seed)
    total, ends = sum(lengths), np.cumsum(lengths)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    end = np.repeat(ends, lengths)
    target = -(end - 1 - np.arange(total)) / max(lengths)
    target[episode == 0] = -1
    return FrameTable(
        images=rng.integers(0, 256, (total, 2, 64, 64, 3), np.uint8),
        state=rng.normal(2, 3, (total, 3)).astype(np.float32),
        action=np.arange(total * 4, dtype=np.float32).reshape(total, 4) / total,
        end=end,
        episode=episode,
        task=episode % 2,
        tasks=TASKS,
        indicator=rng.integers(0, 2, total).astype(np.int8),
        target=target.astype(np.float32),
    )
