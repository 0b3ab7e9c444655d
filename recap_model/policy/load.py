"""Checkpoint folder -> policy."""

import json
from pathlib import Path
from typing import Any

from recap_model.checkpoint import CheckpointFiles, read_checkpoint
from recap_model.normalize import NormStats
from recap_model.policy.config import PolicyConfig
from recap_model.policy.model import Policy
from recap_model.policy.weights import load_weights


def load_policy(path: Path) -> tuple[Policy, CheckpointFiles]:
    """The policy in evaluation mode, and the rest of its folder."""
    files = read_checkpoint(path, "policy")
    return _build(files.config, files.stats, files.path), files


def read_policy(folder: Path) -> Policy:
    """The policy of any folder that holds config.json, norm_stats.json and model.safetensors, in evaluation mode.

    No manifest is read: verify the folder first. Raises PolicyConfigError, WeightsError, OSError.
    """
    folder = Path(folder)
    stats = json.loads((folder / "norm_stats.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    return _build(config, {name: NormStats.from_json(value) for name, value in stats.items()}, folder)


def _build(config: dict[str, Any], stats: dict[str, NormStats], folder: Path) -> Policy:
    policy = Policy(PolicyConfig.from_json(config), stats)
    load_weights(policy, folder / "model.safetensors")
    return policy.eval()
