"""Low-rank adapters (LoRA, arXiv 2106.09685) on the projections of language model and action expert, through `peft`.

The image tower is never adapted: its layers have the names of the others', which is how it gets adapters unnoticed
elsewhere. What is small and tied to the robot trains as a whole and is published: an adapter without the action head
that was trained beside it is worth nothing. The checkpoint holds plain merged weights; the adapter lies beside them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recap_model.policy.model import Policy
from training.settings import PolicySettings

FOLDER = "adapter"
_ADAPTED = r"{}\.layers\.\d+\.(q|k|v|o|mlp\.(gate|up|down))"  # peft matches whole names
_WHOLE = ("state_in", "expert.action_in", "expert.action_out", "expert.time_in", "expert.time_out")
_OF_TOKENS = ("language.embed", "language.norm", "language.head")


def require_lora(settings: PolicySettings, init: Path | None) -> None:
    """Refuse what could not train: no package, no rank, nothing to adapt. Raises ValueError, ModuleNotFoundError."""
    if settings.lora is None:
        return
    import peft  # noqa: F401  its absence is an error that names the extra; better now than after the data is read

    if settings.lora < 1:
        raise ValueError(f"--lora: expected a rank of at least 1, got {settings.lora}; drop it to train the weights")
    if init is None:
        raise ValueError(
            "--lora: expected --init CHECKPOINT, whose weights the adapters adjust, got none; drop --lora to "
            "train from scratch"
        )


def adapted_layers(settings: PolicySettings) -> str:
    """Regular expression of the layers that get adapters; with --train expert those of the action expert alone."""
    return _ADAPTED.format("expert" if settings.train == "expert" else "(language|expert)")


def adapt(policy: Policy, settings: PolicySettings, *, tokens: bool) -> None:
    """Freeze `policy` and give it adapters that change nothing at first; projections of state, action and time train as
    a whole, and with `tokens` (FAST action tokens) embedding and head do too. In place: names of weights change."""
    from peft import LoraConfig, inject_adapter_in_model

    assert settings.lora is not None  # require_lora has seen to it
    # alpha = rank: the adapters' product counts in full, as in openpi
    config = LoraConfig(
        r=settings.lora, lora_alpha=settings.lora, lora_dropout=0.0, bias="none",
        target_modules=adapted_layers(settings),
    )  # fmt: skip
    torch.manual_seed(settings.fit.seed)  # peft draws from the global generator
    policy.requires_grad_(False)
    inject_adapter_in_model(config, policy)
    for name in _WHOLE + (_OF_TOKENS if tokens else ()):
        policy.get_submodule(name).requires_grad_(True)


def merge(policy: Policy, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain weights that compute what the adapted `policy` computes with `weights` (names of its parameters), which
    it is left with."""
    _load(policy, weights)
    merged = {_plain(name): value for name, value in weights.items() if ".lora_" not in name}
    for name, layer in _adapters(policy):
        merged[f"{name}.weight"] = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()
    return merged


def write_adapter(policy: Policy, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter as `peft` opens it into `folder`, which is made, and as trained.safetensors what trained as a
    whole: with these two the base becomes the checkpoint."""
    from peft import get_peft_model_state_dict

    _load(policy, weights)
    folder.mkdir()
    policy.peft_config["default"].save_pretrained(folder)  # type: ignore[union-attr,index,operator]
    state = get_peft_model_state_dict(policy)
    tensors = {f"base_model.model.{name}": _stored(value) for name, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    whole = {n: _stored(p) for n, p in policy.named_parameters() if p.requires_grad and ".lora_" not in n}
    save_file(whole, folder / "trained.safetensors")


def _adapters(policy: Policy) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in policy.named_modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def _load(policy: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in policy.named_parameters():
        parameter.copy_(weights[name])


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
