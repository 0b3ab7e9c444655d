"""What --fast, --insulate, --action-groups and --lora make of a policy before training, and of its checkpoint after."""

from pathlib import Path

from torch import Tensor

from recap_model.normalize import NormStats
from recap_model.policy.model import Policy
from training import action_tokens, lora
from training.loader import Loader
from training.policy_loss import Terms
from training.settings import PolicySettings


def require_losses(settings: PolicySettings, fast: Path | None, init: Path | None, *, mixture: bool) -> None:
    """Refuse what does not go together, before anything is read. Raises ValueError, and ModuleNotFoundError for LoRA
    without its package."""
    losses = settings.losses
    if fast is None and losses.insulate:
        raise ValueError(
            "--insulate: expected --fast FOLDER with it, got none: image tower, language model and state projection "
            "would learn from nothing; make a folder with `recap fit-fast`, or drop --insulate"
        )
    if fast is None and losses.fast_ids is not None:
        raise ValueError(f"--fast-ids: expected --fast FOLDER with it, got {losses.fast_ids} alone; drop it")
    if fast is not None and mixture:
        raise ValueError(
            "--fast: expected none beside --mixture: a tokenizer fits the action dimensions of one robot; train on "
            "--dataset, or drop --fast"
        )
    if fast is not None and settings.train == "expert":
        raise ValueError(
            "--fast: expected a language model that trains, got --train expert, which keeps it; take --train "
            "no-vision, or drop --fast"
        )
    lora.require_lora(settings, init)


def make_terms(
    policy: Policy, settings: PolicySettings, fast: Path | None, init: Path | None, loader: Loader, action: NormStats
) -> Terms:
    """What to train on. The policy is given what that needs: tokens in its vocabulary, adapters in its layers.

    action: the policy's statistics of its actions.
    """
    tokens = None
    if fast is not None:
        tokens = action_tokens.prepare(policy, settings, fast, init, loader.table, action, loader.prompt_ids())
    if settings.lora is not None:
        lora.adapt(policy, settings, tokens=tokens is not None)
    return Terms(tokens, settings.losses.fast_weight, settings.losses.insulate)


def parents(terms: Terms) -> dict[str, str]:
    """What a run was made from beside its data."""
    return {} if terms.tokens is None else {"fast": action_tokens.fingerprint(terms.tokens.fast)}


def metrics(terms: Terms) -> dict[str, float]:
    """What is worth knowing of the terms in the manifest."""
    return {} if terms.tokens is None else {"fast_clamped": terms.tokens.clamped}


def plain_weights(policy: Policy, settings: PolicySettings, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trained `weights` (names of the policy's parameters) as the checkpoint has them: adapters are merged."""
    return weights if settings.lora is None else lora.merge(policy, weights)


def write_beside(
    folder: Path, policy: Policy, settings: PolicySettings, terms: Terms, weights: dict[str, Tensor], init: Path | None
) -> None:
    """What lies beside the weights of a checkpoint: its action tokens, or those of `init`, and the adapter."""
    if terms.tokens is not None:
        terms.tokens.save(folder / action_tokens.FOLDER)
    else:
        action_tokens.carry(None if settings.new_robot else init, folder)
    if settings.lora is not None:
        lora.write_adapter(policy, weights, folder / lora.FOLDER)
