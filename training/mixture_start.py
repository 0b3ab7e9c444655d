"""The policy that a mixture trains, and the robot of it that the checkpoint serves."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from recap_model import conditioning
from recap_model.checkpoint import CheckpointFiles
from recap_model.policy.config import PolicyConfig
from recap_model.policy.load import load_policy
from recap_model.policy.model import Policy
from recap_model.spec import PolicySpec
from recap_model.tokenizer import word_tokenizer
from training.mixture import Mixture
from training.mixture_table import identity_stats, statistics
from training.settings import PolicySettings
from training.start import config_for, fresh_config, new_files, placed, policy_spec, with_weights
from training.table import TableSource, frame_size, require_known_words


def start_mixture(
    settings: PolicySettings, mixture: Mixture, sources: Sequence[TableSource], init: Path | None
) -> tuple[Policy, CheckpointFiles, tuple[PolicySpec, ...]]:
    """(policy whose state and action are the padded, normalised vectors; files with spec, sizes and statistics of the
    served robot and everybody's statistics as "<name>/state" and "<name>/action"; every member's spec)."""
    served = mixture.served
    if init is None:
        blank = [PolicySpec(s.robot, settings.chunk, 0, names_in_prompt=settings.names_in_prompt) for s in sources]
        texts = [spec.text(task) for spec, s in zip(blank, sources, strict=True) for task in s.table.tasks]
        tokenizer = word_tokenizer(texts, settings.max_tokens)
        specs = tuple(replace(spec, max_tokens=tokenizer.max_tokens) for spec in blank)
        config = _wide(settings, sources, fresh_config(settings, sources[served].robot, tokenizer))
        files = new_files(config, specs[served], tokenizer, {})
    else:
        before, files = load_policy(init)
        config = before.config
        specs = tuple(replace(policy_spec(settings, files), robot=source.robot) for source in sources)
        for spec, source in zip(specs, sources, strict=True):
            texts_of = {task: conditioning.unconditional_prompt(spec.text(task)) for task in source.table.tasks}
            require_known_words(files, texts_of, init)
    everybody = training_config(config, mixture, sources)
    stats = identity_stats(everybody.state_dim, everybody.action_dim)
    if init is None:
        torch.manual_seed(settings.fit.seed)
        policy = Policy(everybody, stats)
    else:
        policy = with_weights(before, everybody, stats)
    known = {
        f"{member.name}/{kind}": found
        for member, source in zip(mixture.members, sources, strict=True)
        for kind, found in statistics(source).items()
    }
    own = {kind: known[f"{mixture.members[served].name}/{kind}"] for kind in ("state", "action")}
    robot = sources[served].robot
    files = replace(
        files, config=config_for(everybody, robot, mixture.path).to_json(), spec=specs[served], stats={**own, **known}
    )
    return placed(policy.train(), settings), files, specs


def training_config(config: PolicyConfig, mixture: Mixture, sources: Sequence[TableSource]) -> PolicyConfig:
    """`config` for all robots of a mixture at once: their vectors padded, as many cameras as the richest one has."""
    for member, source in zip(mixture.members, sources, strict=True):
        config_for(config, source.robot, f"{mixture.path}: {member.name}")
    cameras = max(len(source.robot.cameras) for source in sources)
    slots = max(config.cameras + config.empty_cameras, cameras)
    return replace(
        config,
        cameras=cameras,
        empty_cameras=slots - cameras if config.image_tokens is not None else 0,
        frame=frame_size(sources[0].robot),
        state_dim=config.padded_state,
        action_dim=config.padded_action,
        state_width=config.padded_state,
        action_width=config.padded_action,
    )


def _wide(settings: PolicySettings, sources: Sequence[TableSource], config: PolicyConfig) -> PolicyConfig:
    """The preset's padding, or else as much as the largest robot needs."""
    return replace(
        config,
        state_width=settings.state_width or max(len(source.robot.state) for source in sources),
        action_width=settings.action_width or max(len(source.robot.action) for source in sources),
    )
