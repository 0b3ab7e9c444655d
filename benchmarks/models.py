"""Models to measure, with random weights: speed does not depend on what a model has learned. No network, no lerobot."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim
from recap_model.conditioning import positive_prompt, unconditional_prompt
from recap_model.manifest import publish, write_manifest
from recap_model.normalize import NormStats
from recap_model.policy.config import ExpertConfig, LanguageConfig, PolicyConfig, SiglipConfig
from recap_model.policy.model import Policy
from recap_model.policy.sizes import smolvla_base
from recap_model.spec import PolicySpec
from recap_model.tokenizer import TextTokenizer, word_tokenizer
from training.checkpoint import write_checkpoint

TASK = "put the red block into the box"
DIMENSIONS = 6


def smolvla_debug(cameras: int) -> PolicyConfig:
    """The same kinds of layers at a size that a test runs in a second."""
    return PolicyConfig(
        SiglipConfig(image_size=64, width=48, layers=2, heads=3, intermediate=96, shuffle=2),
        LanguageConfig(width=48, layers=4, heads=3, kv_heads=1, head_dim=16, intermediate=96, vocabulary=64, head=True),
        ExpertConfig(width=36, intermediate=256),
        cameras=cameras,
        state_dim=DIMENSIONS,
        action_dim=DIMENSIONS,
        chunk=10,
        max_tokens=24,
        denoise_steps=4,
        frame=(64, 64),
        state_width=32,
        action_width=32,
    )


def config_of(model: str, cameras: int) -> PolicyConfig:
    """smolvla_base: 450 M parameters, 512 px, chunk 50, 10 steps. smolvla_debug: for tests."""
    models = {
        "smolvla_base": lambda: smolvla_base(cameras, DIMENSIONS, DIMENSIONS),
        "smolvla_debug": lambda: smolvla_debug(cameras),
    }
    if model not in models:
        raise ValueError(f"model: expected one of {sorted(models)}, got {model!r}")
    return models[model]()


def write_random_checkpoint(model: str, cameras: int, folder: Path) -> Path:
    """A policy checkpoint with seeded random weights and statistics (0, 1), as `recap train policy` lays it out."""
    config = config_of(model, cameras)
    height, width = config.frame_size
    robot = RobotSpec(
        "benchmark",
        tuple(Camera(f"camera{i}", height, width) for i in range(cameras)),
        tuple(StateDim(f"state_{i}", "1") for i in range(DIMENSIONS)),
        tuple(ActionDim(f"action_{i}", "1", -10.0, 10.0) for i in range(DIMENSIONS)),
        30.0,
        (TASK,),
    )
    one = np.ones(DIMENSIONS)
    stats = {name: NormStats(0 * one, one, -one, one, -one, one) for name in ("state", "action")}
    torch.manual_seed(0)
    policy = Policy(config, stats)
    with publish(folder) as tmp:
        weights = {name: value.detach() for name, value in policy.named_parameters()}
        spec = PolicySpec(robot, config.chunk, config.max_tokens)
        write_checkpoint(tmp, weights, config.to_json(), spec, word_tokenizer((TASK,), config.max_tokens), stats)
        write_manifest(tmp, "policy", parameters={"random weights of": model})
    return folder


def make_inputs(
    config: PolicyConfig, tokenizer: TextTokenizer, batch: int, beta: float
) -> dict[str, NDArray[np.generic]]:
    """Seeded inputs; sample 0 is the same for every batch size."""
    rng = np.random.default_rng(0)
    height, width = config.frame_size
    one = {
        "images": [rng.integers(0, 256, (config.cameras, height, width, 3), np.uint8) for _ in range(batch)],
        "state": [rng.normal(size=config.state_dim).astype(np.float32) for _ in range(batch)],
        "noise": [rng.normal(size=(config.chunk, config.padded_action)).astype(np.float32) for _ in range(batch)],
    }
    noise0 = np.random.default_rng(1).normal(size=one["noise"][0].shape).astype(np.float32)
    state0 = np.random.default_rng(2).normal(size=one["state"][0].shape).astype(np.float32)
    one["noise"][0], one["state"][0] = noise0, state0
    ids, mask = tokenizer(positive_prompt(TASK))
    bare_ids, bare_mask = tokenizer(unconditional_prompt(TASK))
    inputs: dict[str, NDArray[np.generic]] = {name: np.stack(values) for name, values in one.items()}
    inputs |= {"tokens": np.stack([ids] * batch), "token_mask": np.stack([mask] * batch)}
    if beta > 1:
        inputs |= {"unconditional_tokens": np.stack([bare_ids] * batch)}
        inputs |= {"unconditional_mask": np.stack([bare_mask] * batch), "beta": np.full(batch, beta, np.float32)}
    return inputs
