"""A LeRobot SmolVLA -> checkpoint. Reads JSON and safetensors alone: neither lerobot nor code of the source is run."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim
from recap_model.manifest import Manifest, publish, write_manifest
from recap_model.normalize import NormStats
from recap_model.policy.config import PolicyConfig, PositionRule
from recap_model.policy.lerobot_config import IMAGES, camera_features, policy_from_lerobot
from recap_model.policy.lerobot_weights import from_lerobot
from recap_model.policy.model import Policy
from recap_model.policy.weights import assign, read_weights
from recap_model.spec import PolicySpec
from recap_model.tokenizer import TextTokenizer
from training.checkpoint import write_checkpoint
from training.lerobot_files import SPEC_FILE, derive_spec, read_info
from training.lerobot_processors import (
    ACTION,
    STATE,
    LerobotError,
    Processors,
    constant_state,
    dataset_statistics,
    has_needed,
    is_statistic,
    read_processors,
    statistics_of,
)

SPECIAL_TOKENS = ("<fake_token_around_image>", "<global-img>")
SIDECAR = "recap.json"
"""What `recap export-lerobot` writes beside LeRobot's files: the robot's spec and the rule of the patch positions."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WHOLE: tuple[str, ...] = ("chunk_size", "num_steps", "tokenizer_max_length", "max_state_dim", "max_action_dim")
_WHOLE += ("num_vlm_layers", "num_expert_layers", "self_attn_every_n_layers", "empty_cameras")
Note = Callable[[str], None]


def import_policy(
    source: str,
    out: Path,
    *,
    vlm: str | None = None,
    spec: Path | None = None,
    dataset: Path | None = None,
    fps: float | None = None,
    tasks: Sequence[str] = (),
    cameras: Sequence[str] = (),
    positions: PositionRule | None = None,
    note: Note = print,
) -> Manifest:
    """Publish the policy at `source` (a folder or a hub name) as a checkpoint at `out`.

    vlm: SmolVLM2's folder or hub name, by default the one that the policy names. The robot is described by `spec` (a
    robot.json), by `dataset`, by the source when we exported it, or else by the policy's features, `fps` and `tasks`.
    cameras: those that the robot has, as NAME or NAME=ROBOT'S NAME; default all. Raises LerobotError,
    PolicyConfigError or WeightsError.
    """
    folder = fetch(source, ("*.json", "*.safetensors"), "SOURCE")
    read = _read(folder)
    weights = {from_lerobot(name) or name: t for name, t in read.tensors.items() if not is_statistic(name)}
    rule = positions or read.sidecar.get("positions") or default_positions(weights)
    vlm_name, tokenizer, vlm_json = _vlm(vlm, read.config, folder)
    chosen = _cameras(read, cameras)
    robot = _given_robot(spec, dataset, read.sidecar)
    policy = policy_from_lerobot(
        read.config,
        vlm_json,
        cameras=len(chosen),
        frame=_frame(robot, chosen, folder),
        special_ids=_special(read.config, tokenizer),
        positions=rule,
    )
    stats = _statistics(policy, read.processors, dataset, note)
    if robot is None:
        robot = _derived_robot(policy, chosen, stats, fps)
    elif fps is not None and fps != robot.control_hz:
        raise LerobotError(f"--fps: expected {robot.control_hz} Hz, the rate of the robot that is given, got {fps}")
    _require_fit(robot, policy, chosen, folder)
    robot = replace(robot, tasks=tuple(dict.fromkeys((*robot.tasks, *tasks))))
    text = _text(tokenizer, policy)
    module = Policy(policy, stats)
    assign(module, weights, folder / "model.safetensors")
    name = source if _is_hub_name(source) else None
    parameters = {"source": name, "vlm_name": vlm_name, "positions": rule, "format": "lerobot"}
    policy_spec = PolicySpec(robot, policy.chunk, policy.max_tokens)
    with publish(out) as temporary:
        write_checkpoint(temporary, module.state_dict(), policy.to_json(), policy_spec, text, stats)
        return write_manifest(temporary, "policy", parameters={k: v for k, v in parameters.items() if v})


@dataclass(frozen=True)
class _Source:
    """What a LeRobot folder holds. config: with the normalisation that its processors name; sidecar: of our export."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    processors: Processors
    sidecar: dict[str, Any]


def _read(folder: Path) -> _Source:
    config = read_json(folder / "config.json")
    if config.get("type") != "smolvla":
        raise LerobotError(
            f"{folder / 'config.json'}: type: expected one of ['smolvla'], got {config.get('type')!r}: no other policy "
            "class of LeRobot is implemented here"
        )
    odd = {key: config[key] for key in _WHOLE if key in config and type(config[key]) is not int}
    if odd:
        raise LerobotError(f"{folder / 'config.json'}: expected whole numbers, got {odd}")
    tensors = read_weights(folder)
    processors = read_processors(folder, config, tensors)
    norms = config.get("normalization_mapping", {}) if processors.norms is None else processors.norms
    if norms.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise LerobotError(f"{folder}: normalization_mapping.VISUAL: expected 'IDENTITY', got {norms['VISUAL']!r}")
    sidecar = read_json(folder / SIDECAR) if (folder / SIDECAR).is_file() else {}
    return _Source({**config, "normalization_mapping": norms}, tensors, processors, sidecar)


def _frame(robot: RobotSpec | None, cameras: dict[str, tuple[int, int]], folder: Path) -> tuple[int, int]:
    """(height, width) of the robot's frames, or, without a robot's description, of the policy's features."""
    sizes = {(c.height, c.width) for c in robot.cameras} if robot else set(cameras.values())
    if len(sizes) != 1:
        raise LerobotError(
            f"{folder}: cameras: expected frames of one size (height, width), got {sorted(sizes)}; choose with "
            "--cameras, or say with --spec what size the robot's frames have"
        )
    return next(iter(sizes))


def _text(tokenizer: Tokenizer, policy: PolicyConfig) -> TextTokenizer:
    text = TextTokenizer(tokenizer, policy.max_tokens)
    if text.vocabulary_size > policy.language.vocabulary:
        raise LerobotError(
            f"tokenizer.json: expected at most {policy.language.vocabulary} tokens (the policy's vocabulary), got "
            f"{text.vocabulary_size}; give the policy's own SmolVLM2 with --vlm"
        )
    return text


def fetch(source: str, patterns: Sequence[str], what: str) -> Path:
    """A local folder as it is, or the files of a hub repository that match `patterns`, downloaded."""
    if Path(source).is_dir():
        return Path(source)
    if not _is_hub_name(source):
        raise LerobotError(f"{what}: expected a folder or a hub name like 'lerobot/smolvla_base', got {source!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:  # the client's errors have no common class: offline, no such repository, HTTP
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LerobotError(
            f"{what}: expected a folder, or a hub repository that can be reached, got {source!r}: {reason}. "
            "Check the name and the network, or copy the files here and give the folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises LerobotError when the file is missing or holds something else."""
    if not path.is_file():
        raise LerobotError(f"{path.parent}: expected a folder with {path.name}, got none")
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise LerobotError(f"{path}: expected JSON, got text that is none ({error})") from error
    if not isinstance(data, dict):
        raise LerobotError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def default_positions(weights: dict[str, Tensor]) -> PositionRule:
    """The rule of transformers for the dtype in which the tower's weights are stored."""
    is_half = any(name.startswith("vision.") and t.dtype == torch.bfloat16 for name, t in weights.items())
    return "bfloat16" if is_half else "float32"


def _is_hub_name(source: str) -> bool:
    return _HUB_NAME.fullmatch(source) is not None and not Path(source).is_dir()


def _vlm(given: str | None, config: dict[str, Any], folder: Path) -> tuple[str | None, Tokenizer, dict[str, Any]]:
    """(hub name to remember, tokenizer, config.json) of the language model; a path is never remembered."""
    named = str(config.get("vlm_model_name", ""))
    moved = folder / "vlm"  # our own export, copied from where it was written
    source = given or (str(moved) if not _is_hub_name(named) and not Path(named).is_dir() and moved.is_dir() else named)
    vlm = fetch(source, ("config.json", "tokenizer.json"), "--vlm")
    data = read_json(vlm / "config.json")
    if not (vlm / "tokenizer.json").is_file():
        raise LerobotError(f"--vlm: expected a folder with tokenizer.json, got {source!r} without one")
    tokenizer = Tokenizer.from_file(str(vlm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    name = given if given and _is_hub_name(given) else named
    return (name if _is_hub_name(name) else None), tokenizer, data


def _special(config: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, int]:
    first, second = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    if first is None or second is None:
        if config.get("add_image_special_tokens"):
            raise LerobotError(
                f"tokenizer.json: expected the tokens {list(SPECIAL_TOKENS)} (add_image_special_tokens is on), got "
                f"the ids {[first, second]}; give the policy's own SmolVLM2 with --vlm"
            )
        return 0, 0
    return int(first), int(second)


def _cameras(read: _Source, wanted: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The robot's name -> (height, width), in LeRobot's order."""
    known, renamed = camera_features(read.config), read.processors.renamed
    names = {
        name: renamed.get(IMAGES + name, IMAGES + name).removeprefix(IMAGES) for name in known
    }  # fmt: skip
    if wanted:
        pairs = {theirs: robot or names.get(theirs, theirs) for theirs, _, robot in (w.partition("=") for w in wanted)}
        unknown = sorted(set(pairs) - set(known))
        if unknown:
            raise LerobotError(f"--cameras: expected names among {list(known)}, got {unknown}")
        names = {name: pairs[name] for name in known if name in pairs}
    return {robot: known[name] for name, robot in names.items()}


def _given_robot(spec: Path | None, dataset: Path | None, sidecar: dict[str, Any]) -> RobotSpec | None:
    if spec is not None and dataset is not None:
        raise LerobotError("--spec, --dataset: expected one description of the robot, got both")
    if spec is not None:
        return RobotSpec.from_json(read_json(spec))
    if dataset is not None:
        info = read_info(dataset)
        own = dataset / SPEC_FILE
        return RobotSpec.from_json(read_json(own)) if own.is_file() else derive_spec(dataset, info)
    return RobotSpec.from_json(sidecar["robot"]) if "robot" in sidecar else None


def _derived_robot(
    policy: PolicyConfig, cameras: dict[str, tuple[int, int]], stats: dict[str, NormStats], fps: float | None
) -> RobotSpec:
    """Numbered dimensions without units, as wide as the statistics."""
    if fps is None:
        raise LerobotError(
            "--fps: expected the robot's control rate in Hz, got none: a LeRobot policy does not say it; give --fps, "
            "or describe the robot with --spec robot.json or --dataset FOLDER"
        )
    low, high = stats["action"].min, stats["action"].max
    limits = [(float(a), float(b) if b > a else float(a) + 1.0) for a, b in zip(low, high, strict=True)]
    return RobotSpec(
        "lerobot",
        tuple(Camera(name, *size) for name, size in cameras.items()),
        tuple(StateDim(f"state_{i}", "1") for i in range(policy.state_dim)),
        tuple(ActionDim(f"action_{i}", "1", *limit) for i, limit in enumerate(limits)),
        fps,
    )


def _statistics(policy: PolicyConfig, processors: Processors, dataset: Path | None, note: Note) -> dict[str, NormStats]:
    found = dict(processors.statistics)
    for key, mode in ((STATE, policy.state_norm), (ACTION, policy.action_norm)):
        if not has_needed(found.get(key, {}), mode) and dataset is not None:
            found[key] = dataset_statistics(dataset).get(key, {})
            note(f"{key}: the policy holds no finite statistics: taken from {dataset}/meta/stats.json")
    state = statistics_of(found.get(STATE, {}), policy.state_norm, policy.state_dim, STATE)
    action = statistics_of(found.get(ACTION, {}), policy.action_norm, policy.action_dim, ACTION, note)
    return {"state": constant_state(state, policy.state_norm), "action": action}


def _require_fit(robot: RobotSpec, policy: PolicyConfig, cameras: dict[str, tuple[int, int]], folder: Path) -> None:
    """The robot and the policy have the same cameras, in the same order, and vectors of the same length."""
    pairs: dict[str, tuple[object, object]] = {
        "cameras": (list(cameras), list(robot.camera_names)),
        "state": (policy.state_dim, len(robot.state)),
        "action": (policy.action_dim, len(robot.action)),
    }
    wrong = [
        f"{name}: expected {ours} (the policy's), got {theirs} (the robot's)"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    if wrong:
        raise LerobotError(
            f"{folder}: {'; '.join(wrong)}. --cameras NAME=ROBOT_NAME ... chooses and renames the policy's cameras"
        )
