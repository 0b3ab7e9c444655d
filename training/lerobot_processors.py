"""LeRobot's processors as files: the JSON lists of steps around a policy and the statistics that some of them hold."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, from_numpy

from recap_model.normalize import Mode, NormStats
from recap_model.policy.config import PolicyConfig
from recap_model.policy.weights import read_weights

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
STATE, ACTION = "observation.state", "action"
NORMALIZER, UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
RENAME = "rename_observations_processor"
_TOKENIZER, _NEWLINE = "tokenizer_processor", "smolvla_new_line_processor"
_STEPS = {
    PREPROCESSOR: (
        RENAME, "to_batch_processor", _NEWLINE, _TOKENIZER, "device_processor", NORMALIZER
    ),
    POSTPROCESSOR: (UNNORMALIZER, "device_processor"),
}  # fmt: skip
_NEEDED: dict[Mode, tuple[str, ...]] = {
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantile": ("q01", "q99"),
    "identity": (),
}

Array = NDArray[np.float64]
Statistics = dict[str, dict[str, Array]]
"""Feature ("observation.state", "action") -> statistic ("mean", ...) -> [D]."""


class LerobotError(ValueError):
    """A LeRobot folder, or what was asked of it, does not fit what can be imported or exported."""


@dataclass(frozen=True)
class Processors:
    """What a folder's processors say. norms: FeatureType -> LeRobot's mode, None in checkpoints without processors;
    cameras: the policy's camera feature -> what the robot calls it, where the two differ."""

    statistics: Statistics
    norms: dict[str, str] | None
    renamed: dict[str, str]


def read_processors(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Processors:
    """From the processor files of `folder`, or, where it has none, from the buffers that old policies keep among their
    weights (`tensors`). Raises LerobotError for steps that would have to be run here to be imported."""
    pre, post = _steps(folder, PREPROCESSOR), _steps(folder, POSTPROCESSOR)
    if not pre and not post:
        return Processors(_old_statistics(tensors), None, {})
    names = {step["registry_name"] for step in pre + post}
    absent = [name for name in (_NEWLINE, _TOKENIZER, UNNORMALIZER) if name not in names]
    if absent:
        raise LerobotError(
            f"{folder}: expected {PREPROCESSOR}.json and {POSTPROCESSOR}.json with the steps of LeRobot's SmolVLA, got "
            f"none of {absent}; copy both files with their *.safetensors, or save the processors again"
        )
    for step in (s for s in pre if s["registry_name"] == _TOKENIZER):
        got = {"max_length": config.get("tokenizer_max_length"), "padding_side": "right"}
        wrong = {k: v for k, v in step.get("config", {}).items() if k in got and v != got[k]}
        if wrong:
            raise LerobotError(f"{folder}: {_TOKENIZER}: expected { ({k: got[k] for k in wrong}) }, got {wrong}")
    statistics: Statistics = {}
    norms: dict[str, str] = {}
    for step in (s for s in pre + post if s["registry_name"] in (NORMALIZER, UNNORMALIZER)):
        both = step["registry_name"] == NORMALIZER
        norm_map = step.get("config", {}).get("norm_map", {})
        norms |= {k: v for k, v in norm_map.items() if both or k == "ACTION"}
        found = _grouped(_state(folder, step))
        statistics |= {key: value for key, value in found.items() if both or key == ACTION}
    renamed: dict[str, str] = {}
    for step in (s for s in pre if s["registry_name"] == RENAME):
        renamed |= {theirs: robot for robot, theirs in step.get("config", {}).get("rename_map", {}).items()}
    return Processors(statistics, norms, renamed)


def has_needed(found: dict[str, Array], mode: Mode) -> bool:
    """Whether all that `mode` needs is there and finite: a policy that saw no data is saved with infinity."""
    return all(name in found and bool(np.isfinite(found[name]).all()) for name in _NEEDED[mode])


def statistics_of(
    found: dict[str, Array], mode: Mode, width: int, what: str, note: Callable[[str], None] | None = None
) -> NormStats:
    """All six statistics of a vector [width] from those that are there. What `mode` does not use is filled in (limits:
    mean +- 5 std, and `note` is told). Raises LerobotError when one that `mode` needs is missing or misshapen."""
    missing = [name for name in _NEEDED[mode] if name not in found]
    if missing:
        raise LerobotError(
            f"{what}: expected the statistics {list(_NEEDED[mode])} of its normalisation {mode!r}, got "
            f"{sorted(found)}; give --dataset FOLDER to take them from its meta/stats.json"
        )
    for name in _NEEDED[mode]:
        if found[name].shape != (width,) or not np.isfinite(found[name]).all():
            raise LerobotError(
                f"{what}.{name}: expected {width} finite numbers, got shape {list(found[name].shape)}: "
                f"{found[name]}; give --dataset FOLDER to replace statistics that are not finite by those of its data"
            )
    usable = {k: v for k, v in found.items() if v.shape == (width,) and np.isfinite(v).all()}
    if ("min" not in usable or "max" not in usable) and note is not None:
        note(f"{what}: no smallest and largest value in the statistics: the limits are mean +- 5 std")
    pair = next(((usable[a], usable[b]) for a, b in (("min", "max"), ("q01", "q99")) if {a, b} <= usable.keys()), None)
    mean = usable.get("mean", (pair[0] + pair[1]) / 2 if pair else np.zeros(width))
    std = usable.get("std", (pair[1] - pair[0]) / 4 if pair else np.ones(width))
    low, high = usable.get("min", mean - 5 * std), usable.get("max", mean + 5 * std)
    return NormStats(mean, std, low, high, usable.get("q01", low), usable.get("q99", high))


def constant_state(stats: NormStats, mode: Mode, *, back: bool = False) -> NormStats:
    """The same function at a state dimension without spread: LeRobot's min-max maps it to -1, ours to 0.

    back: from ours to LeRobot's, which would divide by 1e-8 where ours divides by 1.
    """
    if mode == "mean_std" and back:
        return replace(stats, std=stats.affine(mode)[1])
    names = {"min_max": ("min", "max"), "quantile": ("q01", "q99")}.get(mode)
    if names is None:
        return stats
    low, high = (getattr(stats, name) for name in names)
    flat, (down, up) = high <= low, (1.0, 1.0) if back else (0.0, 2.0)
    changed = {names[0]: np.where(flat, low - down, low), names[1]: np.where(flat, high + up, high)}
    return replace(stats, **changed)


def write_processors(folder: Path, config: dict[str, Any], policy: PolicyConfig, stats: dict[str, NormStats]) -> None:
    """Both pipelines as `PolicyProcessorPipeline.save_pretrained` names them. config: LeRobot's `config.json`."""
    norms = config["normalization_mapping"]
    inputs, outputs = config["input_features"], config["output_features"]
    tokenizer = {
        "max_length": policy.max_tokens, "task_key": "task", "padding_side": "right", "padding": "max_length",
        "truncation": True, "tokenizer_name": config["vlm_model_name"],
    }  # fmt: skip
    device = {"device": "cpu", "float_dtype": None}
    scaling = {"eps": 1e-8, "features": {**inputs, **outputs}, "norm_map": norms}
    settings = {RENAME: {"rename_map": {}}, _TOKENIZER: tokenizer, "device_processor": device, NORMALIZER: scaling}
    settings[UNNORMALIZER] = {"eps": 1e-8, "features": outputs, "norm_map": norms}
    tensors = {
        f"{key}.{name}": from_numpy(np.asarray(values, np.float64))
        for key, value in (
            (STATE, constant_state(stats["state"], policy.state_norm, back=True)),
            (ACTION, stats["action"]),
        )
        for name, values in value.to_json().items()
    }
    for name, steps in _STEPS.items():
        written = []
        for index, step in enumerate(steps):
            entry: dict[str, Any] = {"registry_name": step, "config": settings.get(step, {})}
            if step in (NORMALIZER, UNNORMALIZER):
                entry["state_file"] = f"{name}_step_{index}_{step}.safetensors"
                save_file(tensors, folder / entry["state_file"])
            written.append(entry)
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": written}, indent=2) + "\n")


def dataset_statistics(dataset: Path) -> Statistics:
    """Of meta/stats.json in a LeRobot dataset; empty when it has none."""
    path = dataset / "meta" / "stats.json"
    data = json.loads(path.read_text()) if path.is_file() else {}
    return {
        key: {name: np.ravel(np.asarray(values, np.float64)) for name, values in data.get(key, {}).items()}
        for key in (STATE, ACTION)
    }


def _steps(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.json"
    if not path.is_file():
        return []
    steps: list[dict[str, Any]] = json.loads(path.read_text()).get("steps", [])
    for index, step in enumerate(steps):
        if "class" in step or step.get("registry_name") not in _STEPS[name]:
            got = f"the class {step['class']!r}" if "class" in step else repr(step.get("registry_name"))
            raise LerobotError(
                f"{path}: steps[{index}]: expected one of {list(_STEPS[name])}, got {got}: code of a checkpoint is "
                "never imported, and leaving a step out changes the actions; save the policy with LeRobot's own steps"
            )
    return steps


def _state(folder: Path, step: dict[str, Any]) -> dict[str, Tensor]:
    name = step.get("state_file")
    if name is None:
        return {}
    if Path(name).name != name:
        raise LerobotError(f"{folder}: state_file: expected the name of a file in this folder, got {name!r}")
    return read_weights(folder / name)


def _grouped(tensors: dict[str, Tensor]) -> Statistics:
    grouped: Statistics = {}
    for key, tensor in tensors.items():
        feature, _, name = key.rpartition(".")
        if feature in (STATE, ACTION):
            grouped.setdefault(feature, {})[name] = np.ravel(tensor.double().numpy())
    return grouped


def is_statistic(name: str) -> bool:
    """Whether a name in model.safetensors is a buffer of an old checkpoint's normalisation, and no weight."""
    return name.startswith(("normalize_inputs.", "unnormalize_outputs.", "normalize_targets."))


def _old_statistics(tensors: dict[str, Tensor]) -> Statistics:
    """`normalize_inputs.buffer_observation_state.mean` and its like."""
    prefixes = {STATE: "normalize_inputs.buffer_observation_state.", ACTION: "unnormalize_outputs.buffer_action."}
    return {
        key: {n.removeprefix(prefix): np.ravel(t.double().numpy()) for n, t in tensors.items() if n.startswith(prefix)}
        for key, prefix in prefixes.items()
    }
