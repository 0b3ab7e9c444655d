"""Checkpoint -> a folder that LeRobot's SmolVLA class opens, written without lerobot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from recap_model.manifest import publish
from recap_model.policy.config import PolicyConfig, PolicyConfigError, SiglipConfig
from recap_model.policy.lerobot_config import lerobot_config, vlm_config
from recap_model.policy.lerobot_weights import to_lerobot
from recap_model.policy.load import load_policy
from recap_model.policy.siglip import position_ids
from recap_model.spec import PolicySpec
from training.lerobot_import import SIDECAR
from training.lerobot_processors import LerobotError, write_processors

# the tokens that SmolVLM2's processor asks for, by its names
_SPECIAL = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
_PADDING = ("<pad>", "<|im_end|>")


def export_policy(
    checkpoint: Path, out: Path, *, vlm_name: str | None = None, note: Callable[[str], None] = print
) -> None:
    """Write config, weights and processors of the policy at `checkpoint` to `out`.

    vlm_name: SmolVLM2 that LeRobot shall build the language model from; by default the one that the policy was imported
    with, else a folder `vlm` inside `out` of the policy's own sizes. Raises PolicyConfigError for a layout that
    LeRobot's class does not have, LerobotError when `out` is a folder of something else.
    """
    policy, files = load_policy(checkpoint)
    if not isinstance(files.spec, PolicySpec):
        raise LerobotError(f"{checkpoint}: expected a policy's spec, got {files.spec.kind!r}")
    if out.exists() and not (out / SIDECAR).is_file():
        raise LerobotError(f"--out: expected a new folder or an earlier export, got {out}, which holds something else")
    name = vlm_name or files.manifest.parameters.get("vlm_name")
    own_vlm = name is None
    name = name or str(out.resolve() / "vlm")
    config = lerobot_config(policy.config, files.spec, name)
    _note_positions(policy.config, note)
    with publish(out) as folder:
        if own_vlm:
            write_vlm(folder / "vlm", policy.config, files.tokenizer.tokenizer)
            note(f"vlm_model_name is the path {name}: when the folder moves, write its new path into config.json "
                 f"and policy_preprocessor.json")  # fmt: skip
        _write_json(folder / "config.json", config)
        save_file(lerobot_weights(policy.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
        write_processors(folder, config, policy.config, files.stats)
        sidecar = {"robot": files.spec.robot.to_json(), "checkpoint": files.manifest.hash}
        _write_json(folder / SIDECAR, {**sidecar, "positions": _positions(policy.config)})


def lerobot_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under LeRobot's names. A policy without the language model's head gets one: no action reads it."""
    if "language.head.weight" not in weights:
        embedding = weights["language.embed.weight"]
        head = {"language.norm.weight": torch.ones(embedding.shape[1]), "language.head.weight": embedding.clone()}
        weights = {**weights, **head}
    return {to_lerobot(name): tensor.contiguous() for name, tensor in weights.items()}


def write_vlm(folder: Path, policy: PolicyConfig, tokenizer: Tokenizer) -> None:
    """A SmolVLM2 folder of the policy's sizes (config, tokenizer, processor), without weights: LeRobot builds the model
    from it and then loads the policy's. Special tokens that the tokenizer lacks are appended."""
    folder.mkdir(parents=True)
    copy = Tokenizer.from_str(tokenizer.to_str())
    new = [token for token in _SPECIAL.values() if copy.token_to_id(token) is None]
    copy.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])
    if copy.get_vocab_size() > policy.language.vocabulary:
        raise PolicyConfigError(
            f"export: expected room for the {len(new)} special tokens {new} in the policy's vocabulary of "
            f"{policy.language.vocabulary}, got a tokenizer of "
            f"{tokenizer.get_vocab_size()}; name a SmolVLM2 with --vlm-name"
        )
    padding = next((token for token in _PADDING if copy.token_to_id(token) is not None), None) or copy.id_to_token(0)
    unknown = {"unk_token": "<unk>"} if copy.token_to_id("<unk>") is not None else {}
    copy.save(str(folder / "tokenizer.json"))
    image, pad = copy.token_to_id(_SPECIAL["image_token"]), copy.token_to_id(padding)
    _write_json(folder / "config.json", vlm_config(policy, image, pad))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": padding, **unknown,
            "extra_special_tokens": _SPECIAL, **_SPECIAL,
        },
    )  # fmt: skip
    _write_json(folder / "preprocessor_config.json", {"image_processor_type": "SmolVLMImageProcessor"})
    tokens = policy.vision.tokens
    _write_json(folder / "processor_config.json", {"processor_class": "SmolVLMProcessor", "image_seq_len": tokens})


def _positions(policy: PolicyConfig) -> str:
    return policy.vision.positions if isinstance(policy.vision, SiglipConfig) else "float32"


def _note_positions(policy: PolicyConfig, note: Callable[[str], None]) -> None:
    """LeRobot's class computes in the dtype of the weights that it opens, and these are float32."""
    vision = policy.vision
    if not isinstance(vision, SiglipConfig):
        return
    moved = int((position_ids(vision.grid, vision.positions) != position_ids(vision.grid, "float32")).sum())
    if moved:
        note(
            f"{moved} of {vision.grid**2} patches stand at another position in LeRobot, which computes positions in "
            f"float32, than here ({vision.positions}): its actions will differ slightly"
        )


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
