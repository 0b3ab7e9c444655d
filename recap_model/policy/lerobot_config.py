"""LeRobot's SmolVLA configuration <-> ours. Plain JSON objects on both sides; no torch, no lerobot.

Three files describe a LeRobot SmolVLA: the policy's `config.json`, the `config.json` of the vision-language model that
it names (`vlm_model_name`), and the normalisation in `policy_preprocessor.json`.
"""

from typing import Any

from recap_model.normalize import Mode
from recap_model.policy.config import (
    ExpertConfig,
    LanguageConfig,
    PolicyConfig,
    PolicyConfigError,
    PositionRule,
    SiglipConfig,
)
from recap_model.spec import PolicySpec

IMAGES = "observation.images."
EMPTY_CAMERA = IMAGES + "empty_camera_"
_NORMS: dict[str, Mode] = {
    "MEAN_STD": "mean_std",
    "MIN_MAX": "min_max",
    "QUANTILES": "quantile",
    "IDENTITY": "identity",
}

# what LeRobot's class would do and ours does not: refused rather than ignored
_UNSUPPORTED: dict[str, Any] = {
    "adapt_to_pi_aloha": False,
    "use_delta_joint_actions_aloha": False,
    "n_obs_steps": 1,
    "use_peft": False,
}


def expert_width(language_width: int, multiplier: float) -> int:
    """Width of the expert beside a language model (LeRobot: `expert_width_multiplier`)."""
    return int(language_width * multiplier)


def expert_intermediate(width: int) -> int:
    """Width inside the expert's MLP: 8/3 of its width, up to the next multiple of 256 (`get_intermediate_size`)."""
    inner = 4 * int(2 * width / 3)
    return 256 * ((inner + 255) // 256)


def vision_from_vlm(vlm: dict[str, Any], positions: PositionRule) -> SiglipConfig:
    """The tower of a SmolVLM2 `config.json`."""
    vision = _section(vlm, "vision_config")
    return SiglipConfig(
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 32),
        width=vision.get("hidden_size", 1152),
        layers=vision.get("num_hidden_layers", 12),
        heads=vision.get("num_attention_heads", 16),
        intermediate=vision.get("intermediate_size", 3072),
        shuffle=vlm.get("scale_factor", 2),
        positions=positions,
    )


def language_from_vlm(vlm: dict[str, Any], layers: int) -> LanguageConfig:
    """The first `layers` layers (0 or less: all) of a SmolVLM2 `config.json`."""
    text = _section(vlm, "text_config")
    heads = text["num_attention_heads"]
    if text.get("rms_norm_eps", 1e-5) != 1e-5 or text.get("hidden_act", "silu") != "silu":
        raise PolicyConfigError(
            "vlm.text_config: expected rms_norm_eps 1e-05 and hidden_act 'silu' (SmolLM2), got "
            f"{text.get('rms_norm_eps')} and {text.get('hidden_act')!r}"
        )
    return LanguageConfig(
        width=text["hidden_size"],
        layers=min(layers, text["num_hidden_layers"]) if layers > 0 else text["num_hidden_layers"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads", heads),
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        intermediate=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        head=True,
    )


def policy_from_lerobot(
    config: dict[str, Any],
    vlm: dict[str, Any],
    *,
    cameras: int,
    frame: tuple[int, int],
    special_ids: tuple[int, int],
    positions: PositionRule = "bfloat16",
) -> PolicyConfig:
    """config: the policy's `config.json`; vlm: the language model's. cameras, frame: of the robot that is served.

    special_ids: ids of `<fake_token_around_image>` and `<global-img>`. Raises PolicyConfigError for another family
    and for what only LeRobot's class could do.
    """
    _require_supported(config)
    vision = vision_from_vlm(vlm, positions)
    side = list(config.get("resize_imgs_with_padding") or [])
    if side != [vision.image_size] * 2:
        raise PolicyConfigError(
            f"resize_imgs_with_padding: expected the tower's square {[vision.image_size] * 2}, got {side or None}"
        )
    language = language_from_vlm(vlm, config["num_vlm_layers"])
    width = expert_width(language.width, config["expert_width_multiplier"])
    layers = config["num_expert_layers"]
    norms = config["normalization_mapping"]
    return PolicyConfig(
        vision,
        language,
        ExpertConfig(
            width=width,
            intermediate=expert_intermediate(width),
            self_attn_every=max(config["self_attn_every_n_layers"], 0),
            min_period=config["min_period"],
            max_period=config["max_period"],
            attention="cross_attn" if "cross" in config["attention_mode"] else "self_attn",
            layers=layers if layers > 0 else None,
        ),
        cameras=cameras,
        state_dim=_dimension(config, "input_features", "observation.state"),
        action_dim=_dimension(config, "output_features", "action"),
        chunk=config["chunk_size"],
        max_tokens=config["tokenizer_max_length"],
        denoise_steps=config["num_steps"],
        state_norm=_norm(norms, "STATE"),
        action_norm=_norm(norms, "ACTION"),
        frame=frame,
        state_width=config["max_state_dim"],
        action_width=config["max_action_dim"],
        image_tokens=special_ids if config["add_image_special_tokens"] else None,
        # LeRobot's class adds this many to the named ones and fills them up, whichever of those are present
        empty_cameras=config["empty_cameras"],
    )


def camera_features(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Camera name -> (height, width) [px] in LeRobot's order, without the ones that stand for missing cameras."""
    features = config.get("input_features", {})
    visual = {key: value for key, value in features.items() if value.get("type") == "VISUAL"}
    return {
        key.removeprefix(IMAGES): (int(value["shape"][-2]), int(value["shape"][-1]))
        for key, value in visual.items()
        if not key.startswith(EMPTY_CAMERA)
    }


def lerobot_config(policy: PolicyConfig, spec: PolicySpec, vlm_name: str) -> dict[str, Any]:
    """The `config.json` with which LeRobot's `SmolVLAPolicy.from_pretrained` opens our weights."""
    vision, expert = policy.vision, policy.expert
    if not isinstance(vision, SiglipConfig) or policy.action_width is None or policy.state_width is None:
        raise PolicyConfigError(
            f"export: expected a policy with SmolVLM2's tower and padded vectors, got vision {vision.kind!r}, "
            f"state_width {policy.state_width}, action_width {policy.action_width}; LeRobot's SmolVLA class has no "
            "other layout. Train from a preset `smolvla_*`"
        )
    images = {
        IMAGES + camera.name: {"type": "VISUAL", "shape": [3, camera.height, camera.width]}
        for camera in spec.robot.cameras
    }
    names = {ours: theirs for theirs, ours in _NORMS.items()}
    if expert_intermediate(expert.width) != expert.intermediate:
        raise PolicyConfigError(
            f"export: expected expert.intermediate {expert_intermediate(expert.width)} for width {expert.width} "
            f"(LeRobot computes it), got {expert.intermediate}"
        )
    return {
        "type": "smolvla",
        "n_obs_steps": 1,
        "input_features": {**images, "observation.state": {"type": "STATE", "shape": [policy.state_dim]}},
        "output_features": {"action": {"type": "ACTION", "shape": [policy.action_dim]}},
        "device": "cpu",
        "use_amp": False,
        "push_to_hub": False,
        "chunk_size": policy.chunk,
        "n_action_steps": policy.chunk,
        "normalization_mapping": {
            "VISUAL": "IDENTITY",
            "STATE": names[policy.state_norm],
            "ACTION": names[policy.action_norm],
        },
        "max_state_dim": policy.state_width,
        "max_action_dim": policy.action_width,
        "resize_imgs_with_padding": [vision.image_size, vision.image_size],
        "empty_cameras": policy.empty_cameras,
        "tokenizer_max_length": policy.max_tokens,
        "num_steps": policy.denoise_steps,
        "vlm_model_name": vlm_name,
        "load_vlm_weights": False,
        "add_image_special_tokens": policy.image_tokens is not None,
        "attention_mode": expert.attention,
        "pad_language_to": "max_length",
        "num_expert_layers": expert.layers or -1,
        "num_vlm_layers": policy.language.layers,
        "self_attn_every_n_layers": expert.self_attn_every or -1,
        "expert_width_multiplier": _multiplier(expert.width, policy.language.width),
        "min_period": expert.min_period,
        "max_period": expert.max_period,
    }


def vlm_config(policy: PolicyConfig, image_token: int, pad_token: int) -> dict[str, Any]:
    """A SmolVLM2 `config.json` of the policy's sizes, for LeRobot's class to build its language model from."""
    vision, language = policy.vision, policy.language
    if not isinstance(vision, SiglipConfig):
        raise PolicyConfigError(f"vision: expected SmolVLM2's tower 'siglip', got {vision.kind!r}")
    return {
        "model_type": "smolvlm",
        "architectures": ["SmolVLMForConditionalGeneration"],
        "image_token_id": image_token,
        "pad_token_id": pad_token,
        "scale_factor": vision.shuffle,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": vision.width,
            "intermediate_size": vision.intermediate,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": language.width,
            "intermediate_size": language.intermediate,
            "num_hidden_layers": language.layers,
            "num_attention_heads": language.heads,
            "num_key_value_heads": language.kv_heads,
            "head_dim": language.head_dim,
            "rms_norm_eps": 1e-5,
            "vocab_size": language.vocabulary,
            "pad_token_id": pad_token,
            "tie_word_embeddings": False,
        },
    }


def _require_supported(config: dict[str, Any]) -> None:
    family = config.get("type")
    if family != "smolvla":
        raise PolicyConfigError(f"config.json: type: expected one of ['smolvla'], got {family!r}")
    wrong = {k: config[k] for k, v in _UNSUPPORTED.items() if k in config and config[k] != v}
    if wrong:
        expected = {k: _UNSUPPORTED[k] for k in wrong}
        raise PolicyConfigError(f"config.json: expected {expected}, got {wrong}: not supported here")
    needed = [
        "num_vlm_layers",
        "expert_width_multiplier",
        "num_expert_layers",
        "normalization_mapping",
        "chunk_size",
        "empty_cameras",
        "self_attn_every_n_layers",
        "attention_mode",
        "min_period",
        "max_period",
        "tokenizer_max_length",
        "num_steps",
        "max_state_dim",
        "max_action_dim",
        "add_image_special_tokens",
    ]
    missing = [key for key in needed if key not in config]
    if missing:
        raise PolicyConfigError(f"config.json: expected the keys of LeRobot's SmolVLAConfig, got none of {missing}")


def _norm(norms: dict[str, str], kind: str) -> Mode:
    name = norms.get(kind, "IDENTITY")
    if name not in _NORMS:
        raise PolicyConfigError(f"normalization_mapping.{kind}: expected one of {sorted(_NORMS)}, got {name!r}")
    return _NORMS[name]


def _dimension(config: dict[str, Any], group: str, key: str) -> int:
    feature = config.get(group, {}).get(key)
    if feature is None or len(feature["shape"]) != 1:
        raise PolicyConfigError(f"config.json: {group}: expected a vector {key!r}, got {sorted(config.get(group, {}))}")
    return int(feature["shape"][0])


def _section(vlm: dict[str, Any], name: str) -> dict[str, Any]:
    if vlm.get("model_type") != "smolvlm" or name not in vlm:
        raise PolicyConfigError(
            f"vlm config.json: expected a SmolVLM2 model (model_type 'smolvlm' with a {name}), "
            f"got model_type {vlm.get('model_type')!r} and the keys {sorted(vlm)}"
        )
    section: dict[str, Any] = vlm[name]
    return section


def _multiplier(expert: int, language: int) -> float:
    """The multiplier from which LeRobot computes exactly `expert` (it truncates)."""
    multiplier = expert / language
    return multiplier if expert_width(language, multiplier) == expert else (expert + 0.5) / language
