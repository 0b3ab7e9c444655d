"""LeRobot's own SmolVLA class with random weights at reduced width, and our policy with the same weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from recap_model.normalize import NormStats
from recap_model.policy.config import PolicyConfig, PositionRule
from recap_model.policy.lerobot_config import policy_from_lerobot
from recap_model.policy.lerobot_weights import from_lerobot
from recap_model.policy.model import Policy

WORDS = ("<pad>", "<unk>", "<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", "\n")
WORDS += ("open", "the", "drawer", "door", "Advantage", ":", "positive", "negative")
SPECIAL = (2, 4)
VLM = {"vision_width": 32, "vision_layers": 12, "vision_heads": 2, "side": 64, "shuffle": 2}
VLM |= {"width": 96, "layers": 16, "heads": 3, "kv_heads": 1, "head_dim": 16, "intermediate": 80}


def write_vlm(folder: Path, **sizes: int) -> Path:
    """A SmolVLM2 folder (config, tokenizer, processor) of the layer structure of the 500M model at reduced width."""
    s = VLM | sizes
    folder.mkdir(parents=True, exist_ok=True)
    vision = {
        "model_type": "smolvlm_vision", "hidden_size": s["vision_width"], "intermediate_size": 2 * s["vision_width"],
        "num_hidden_layers": s["vision_layers"], "num_attention_heads": s["vision_heads"],
        "image_size": s["side"], "patch_size": 16,
    }  # fmt: skip
    text = {
        "model_type": "llama", "hidden_size": s["width"], "intermediate_size": s["intermediate"],
        "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"], "num_key_value_heads": s["kv_heads"],
        "head_dim": s["head_dim"], "rms_norm_eps": 1e-5, "vocab_size": 64, "pad_token_id": 0, "rope_theta": 100_000,
        "tie_word_embeddings": False,
    }  # fmt: skip
    config = {
        "model_type": "smolvlm", "image_token_id": 3, "pad_token_id": 0, "scale_factor": s["shuffle"],
        "tie_word_embeddings": False, "vision_config": vision, "text_config": text,
    }  # fmt: skip
    special = {"fake_image_token": WORDS[2], "image_token": WORDS[3], "global_image_token": WORDS[4]}
    special["end_of_utterance_token"] = WORDS[5]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    files: dict[str, Any] = {
        "config.json": config,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>",
            "extra_special_tokens": special, **special,
        },
        "preprocessor_config.json": {"image_processor_type": "SmolVLMImageProcessor"},
        "processor_config.json": {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data))
    return folder


def lerobot_policy(vlm: Path, *, frame: tuple[int, int] = (48, 64), cameras: int = 2, **options: Any) -> SmolVLAPolicy:
    """LeRobot's class with seeded random weights. options: fields of its SmolVLAConfig."""
    side = json.loads((vlm / "config.json").read_text())["vision_config"]["image_size"]
    images = {f"observation.images.c{i}": PolicyFeature(FeatureType.VISUAL, (3, *frame)) for i in range(cameras)}
    defaults: dict[str, Any] = {
        "chunk_size": 6, "n_action_steps": 6, "num_steps": 4, "tokenizer_max_length": 12, "num_vlm_layers": 16,
        "resize_imgs_with_padding": (side, side), "device": "cpu", "vlm_model_name": str(vlm),
    }  # fmt: skip
    config = SmolVLAConfig(
        input_features={**images, "observation.state": PolicyFeature(FeatureType.STATE, (5,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (4,))},
        **{**defaults, **options},
    )
    torch.manual_seed(0)
    policy = SmolVLAPolicy(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            # norms and biases away from 1 and 0, the rest large enough that every path reaches the actions
            scale = 0.3 if p.ndim < 2 else 1.2 * p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (1.0 if name.endswith("norm.weight") else 0.0))
    return policy.eval()


def our_config(theirs: SmolVLAPolicy, present: int, frame: tuple[int, int], positions: PositionRule) -> PolicyConfig:
    c = theirs.config
    data = {k: getattr(c, k) for k in vars(c)}
    data |= {"type": "smolvla", "normalization_mapping": {k: v.value for k, v in c.normalization_mapping.items()}}
    for group in ("input_features", "output_features"):
        data[group] = {k: {"type": v.type.value, "shape": list(v.shape)} for k, v in data[group].items()}
    vlm = json.loads((Path(c.vlm_model_name) / "config.json").read_text())
    return policy_from_lerobot(data, vlm, cameras=present, frame=frame, special_ids=SPECIAL, positions=positions)


def our_policy(
    theirs: SmolVLAPolicy, *, present: int = 2, frame: tuple[int, int] = (48, 64), positions: PositionRule = "float32"
) -> Policy:
    """Our class with LeRobot's weights; statistics are zero and one, so that both sides see the same numbers."""
    unit = [NormStats(np.zeros(n), np.ones(n), -np.ones(n), np.ones(n), -np.ones(n), np.ones(n)) for n in (5, 4)]
    policy = Policy(our_config(theirs, present, frame, positions), {"state": unit[0], "action": unit[1]})
    renamed = {from_lerobot(name): p.detach() for name, p in theirs.named_parameters()}
    policy.load_state_dict({name: p for name, p in renamed.items() if name}, strict=True)
    return policy.eval()
