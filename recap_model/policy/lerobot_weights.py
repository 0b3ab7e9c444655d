"""Names of the weights: ours and those of LeRobot's SmolVLA class, both ways."""

import re

_VLM = "model.vlm_with_expert.vlm."
_TEXT, _VISION, _EXPERT = _VLM + "model.text_model.", _VLM + "model.vision_model.", "model.vlm_with_expert.lm_expert."

# module path of ours -> LeRobot's; {} is a layer number
_MODULES: dict[str, str] = {
    "vision.patch": _VISION + "embeddings.patch_embedding",
    "vision.position": _VISION + "embeddings.position_embedding.weight",
    "vision.norm": _VISION + "post_layernorm",
    "vision.connector": _VLM + "model.connector.modality_projection.proj",
    "language.embed": _TEXT + "embed_tokens",
    "language.norm": _TEXT + "norm",
    "language.head": _VLM + "lm_head",
    "state_in": "model.state_proj",
    "expert.norm": _EXPERT + "norm",
    "expert.action_in": "model.action_in_proj",
    "expert.action_out": "model.action_out_proj",
    "expert.time_in": "model.action_time_mlp_in",
    "expert.time_out": "model.action_time_mlp_out",
}
_VISION_LAYER = {"norm1": "layer_norm1", "norm2": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"}
_VISION_LAYER |= {name: f"self_attn.{name}_proj" for name in "qkv"} | {"o": "self_attn.out_proj"}
_LAYER = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
_LAYER |= {name: f"self_attn.{name}_proj" for name in "qkvo"}
_LAYER |= {f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_MODULES |= {f"vision.layers.{{}}.{k}": _VISION + f"encoder.layers.{{}}.{v}" for k, v in _VISION_LAYER.items()}
_MODULES |= {f"language.layers.{{}}.{k}": _TEXT + f"layers.{{}}.{v}" for k, v in _LAYER.items()}
_MODULES |= {f"expert.layers.{{}}.{k}": _EXPERT + f"layers.{{}}.{v}" for k, v in _LAYER.items()}
_BACK = {theirs: ours for ours, theirs in _MODULES.items()}

_NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def to_lerobot(name: str) -> str:
    """Our parameter name -> LeRobot's. Raises KeyError for one that LeRobot's class does not have."""
    return _translate(name, _MODULES)


def from_lerobot(name: str) -> str | None:
    """LeRobot's parameter name -> ours; None for a name that its class does not have.

    Names that `torch.compile` and older releases prefixed are understood.
    """
    try:
        return _translate(name.replace("._orig_mod", ""), _BACK)
    except KeyError:
        return None


def _translate(name: str, table: dict[str, str]) -> str:
    number = _NUMBER.search(name)
    pattern = _NUMBER.sub("{}", name)
    if pattern in table:
        translated = table[pattern]
    else:
        module, _, leaf = pattern.rpartition(".")
        target = table[module]
        # "vision.position" is a parameter here and a module with a `weight` there
        translated = f"{target}.{leaf}"
    return translated.format(number.group()) if number else translated
