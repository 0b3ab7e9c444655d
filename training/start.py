"""The policy that training starts from: a fresh one, a checkpoint, or a checkpoint's weights under a new robot.

What ties the weights of a padded policy to a robot is its spec, its statistics and its numbers of dimensions: the
projections of state and action are as wide as the padding. `--new-robot` replaces these three and keeps every weight.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from recap_client.spec import RobotSpec, SpecError, require_equal
from recap_model import conditioning
from recap_model.checkpoint import CheckpointFiles
from recap_model.normalize import NormStats
from recap_model.policy.config import ConvConfig, PolicyConfig
from recap_model.policy.load import load_policy
from recap_model.policy.model import Policy
from recap_model.spec import PolicySpec
from recap_model.tokenizer import TextTokenizer, word_tokenizer
from training.loop import pick_device
from training.mixture import FILE
from training.settings import PolicySettings
from training.table import TableSource, frame_size, image_side, require_known_words


def start(settings: PolicySettings, source: TableSource, init: Path | None) -> tuple[Policy, CheckpointFiles]:
    """A policy to train on the device of `settings`, and the other files of the checkpoint that it will become."""
    policy, files = _fresh(settings, source) if init is None else _from_checkpoint(settings, source, init)
    return placed(policy.train(), settings), files


def _fresh(settings: PolicySettings, source: TableSource) -> tuple[Policy, CheckpointFiles]:
    """Random weights, statistics and vocabulary of the data."""
    robot = source.robot
    stats = {"state": NormStats.of(source.table.state), "action": NormStats.of(source.table.action)}
    spec = PolicySpec(robot, settings.chunk, 0, names_in_prompt=settings.names_in_prompt)
    tokenizer = word_tokenizer([spec.text(task) for task in source.table.tasks], settings.max_tokens)
    spec = replace(spec, max_tokens=tokenizer.max_tokens)
    config = fresh_config(settings, robot, tokenizer)
    torch.manual_seed(settings.fit.seed)
    return Policy(config, stats), new_files(config, spec, tokenizer, stats)


def fresh_config(settings: PolicySettings, robot: RobotSpec, tokenizer: TextTokenizer) -> PolicyConfig:
    """The sizes of `settings` for a robot and a vocabulary."""
    vision, vocabulary = settings.vision, padded_vocabulary(tokenizer)
    if isinstance(vision, ConvConfig):
        vision = replace(vision, image_size=image_side(robot))
    else:  # LeRobot's layout: the preset's vocabulary stays, with room for the special tokens that an export adds
        vocabulary = max(settings.language.vocabulary, padded_vocabulary(tokenizer, spare=4))
    return PolicyConfig(
        vision,
        replace(settings.language, vocabulary=vocabulary),
        settings.expert,
        cameras=len(robot.cameras),
        state_dim=len(robot.state),
        action_dim=len(robot.action),
        chunk=settings.chunk,
        max_tokens=tokenizer.max_tokens,
        denoise_steps=settings.denoise_steps,
        frame=frame_size(robot),
        state_width=settings.state_width,
        action_width=settings.action_width,
    )


def new_files(
    config: PolicyConfig, spec: PolicySpec, tokenizer: TextTokenizer, stats: dict[str, NormStats]
) -> CheckpointFiles:
    """The files of a checkpoint that does not lie on disk yet: no path, no manifest."""
    return CheckpointFiles(Path(), config.to_json(), spec, tokenizer, stats, None)  # type: ignore[arg-type]


def _from_checkpoint(settings: PolicySettings, source: TableSource, init: Path) -> tuple[Policy, CheckpointFiles]:
    policy, files = load_policy(init)
    files = replace(files, spec=policy_spec(settings, files))
    if settings.new_robot:
        stats = {"state": NormStats.of(source.table.state), "action": NormStats.of(source.table.action)}
        return _for_robot(policy, files, source, source.robot, stats, init)
    try:
        robot = source.known_robot(files, init)
    except SpecError as error:
        member = _member(files, source)
        if member is None:
            raise SpecError(f"{error}{_way_out(policy.config, source.robot, init)}") from error
        robot, stats = member
        return _for_robot(policy, files, source, robot, stats, init)
    return _for_robot(policy, files, source, robot, files.stats, init)


def policy_spec(settings: PolicySettings, files: CheckpointFiles) -> PolicySpec:
    """A checkpoint's spec; its prompts name the robot's numbers from now on if `settings` say so."""
    assert isinstance(files.spec, PolicySpec)
    return replace(files.spec, names_in_prompt=files.spec.names_in_prompt or settings.names_in_prompt)


def _for_robot(
    policy: Policy,
    files: CheckpointFiles,
    source: TableSource,
    robot: RobotSpec,
    stats: dict[str, NormStats],
    init: Path,
) -> tuple[Policy, CheckpointFiles]:
    """The weights of `policy` with spec, sizes and statistics of `robot`. Refuses words that it cannot read."""
    spec = replace(files.spec, robot=robot)
    assert isinstance(spec, PolicySpec)
    # a task that the checkpoint was declared for is its owner's word, and an imported one's vocabulary may lack it
    known = () if spec.names_in_prompt else files.spec.robot.tasks
    new = [task for task in source.table.tasks if task not in known]
    texts = {task: conditioning.unconditional_prompt(spec.text(task)) for task in new}
    require_known_words(files, texts, init)
    if stats is files.stats:
        return policy, replace(files, spec=spec)
    config = config_for(policy.config, robot, init)
    return with_weights(policy, config, stats), replace(files, config=config.to_json(), spec=spec, stats=stats)


def _member(files: CheckpointFiles, source: TableSource) -> tuple[RobotSpec, dict[str, NormStats]] | None:
    """(robot with the data's tasks, its statistics) when the data is of a robot that the checkpoint was pre-trained
    with; the one that it serves is not looked for here."""
    path = files.path / FILE
    for member in json.loads(path.read_text())["datasets"] if path.is_file() else ():
        known = RobotSpec.from_json(member["robot"])
        try:
            require_equal(known, source.robot, what=member["name"])
        except SpecError:
            continue
        new = tuple(task for task in source.table.tasks if task not in known.tasks)
        stats = {kind: files.stats[f"{member['name']}/{kind}"] for kind in ("state", "action")}
        return replace(known, tasks=known.tasks + new), stats
    return None


def config_for(config: PolicyConfig, robot: RobotSpec, where: object) -> PolicyConfig:
    """`config` with the dimensions and cameras of `robot`; every weight keeps its shape.

    A camera fewer than before becomes an empty one where special tokens stand around cameras (LeRobot's rule: of a
    missing camera these are all that is seen); where there are none, nothing of it is left. Raises SpecError when the
    robot does not fit: more dimensions than the padding holds, or frames that a convolutional tower cannot take.
    """
    most, got = (config.padded_state, config.padded_action), (len(robot.state), len(robot.action))
    if got[0] > most[0] or got[1] > most[1]:
        raise SpecError(
            f"{where}: expected a robot of at most {most[0]} state and {most[1]} action dimensions (what the model "
            f"pads its vectors to), got {got[0]} and {got[1]}; take a checkpoint, or without --init a preset, with "
            "wider padding"
        )
    frame = frame_size(robot)
    if isinstance(config.vision, ConvConfig) and frame != config.frame_size:
        side = config.vision.image_size
        raise SpecError(
            f"{where}: expected cameras of {side}x{side} px (the convolutional tower has learned "
            f"positions for that size), got {frame[0]}x{frame[1]}; resize the frames before ingesting, or start from a "
            "checkpoint of a preset `smolvla_*`, whose image tower takes any shape"
        )
    slots, cameras = config.cameras + config.empty_cameras, len(robot.cameras)
    return replace(
        config,
        cameras=cameras,
        empty_cameras=max(slots - cameras, 0) if config.image_tokens is not None else 0,
        state_dim=got[0],
        action_dim=got[1],
        frame=frame,
        state_width=most[0],
        action_width=most[1],
    )


def with_weights(policy: Policy, config: PolicyConfig, stats: dict[str, NormStats]) -> Policy:
    """A policy of `config` and `stats` with the weights of `policy`, which must have the same shapes."""
    made = Policy(config, stats)
    made.load_state_dict(policy.state_dict())
    return made.eval()


def _way_out(config: PolicyConfig, robot: RobotSpec, where: Path) -> str:
    """What to do about data of another robot, if these weights can start it."""
    try:
        config_for(config, robot, where)
    except SpecError:
        return ""
    return "; to start this robot from those weights, with statistics of its own data, add --new-robot"


def placed(policy: Policy, settings: PolicySettings) -> Policy:
    """On the device to train on, with `settings.train` applied; channels last is what convolutions are fastest with."""
    kept = {"all": (), "no-vision": (policy.vision,), "expert": (policy.vision, policy.language)}
    for part in kept[settings.train]:
        part.requires_grad_(False)
    device = pick_device(settings.fit.device)
    return policy.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def padded_vocabulary(tokenizer: TextTokenizer, spare: int = 0) -> int:
    """Vocabulary size with `spare` more tokens, rounded up to a multiple of 8, as matrix units like it."""
    return 8 * math.ceil((tokenizer.vocabulary_size + spare) / 8)
