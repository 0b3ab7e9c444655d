"""Checkpoint folder -> critic."""

from pathlib import Path

from recap_model.checkpoint import CheckpointFiles, read_checkpoint
from recap_model.critic.config import CriticConfig
from recap_model.critic.model import Critic
from recap_model.policy.weights import load_weights


def load_critic(path: Path) -> tuple[Critic, CheckpointFiles]:
    """The critic in evaluation mode, and the rest of its folder."""
    files = read_checkpoint(path, "critic")
    critic = Critic(CriticConfig.from_json(files.config), files.stats)
    load_weights(critic, files.path / "model.safetensors")
    return critic.eval(), files
