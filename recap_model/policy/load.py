"""Checkpoint folder -> policy."""

from pathlib import Path

from safetensors.torch import load_model

from recap_model.checkpoint import CheckpointFiles, read_checkpoint
from recap_model.policy.config import PolicyConfig
from recap_model.policy.model import Policy


def load_policy(path: Path) -> tuple[Policy, CheckpointFiles]:
    """The policy in evaluation mode, and the rest of its folder."""
    files = read_checkpoint(path, "policy")
    policy = Policy(PolicyConfig.from_json(files.config), files.stats)
    load_model(policy, files.path / "model.safetensors")
    return policy.eval(), files
