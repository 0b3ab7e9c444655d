"""Train a policy: plain imitation, advantage-conditioned (RECAP), or imitation of the positive frames alone."""

import json
from dataclasses import asdict
from pathlib import Path

from recap_model.manifest import Manifest, publish, read_manifest, write_manifest
from training import policy_terms
from training.action_groups import with_groups
from training.checkpoint import write_checkpoint
from training.distributed import once
from training.loader import Loader
from training.loop import fit, forget_state, pick_device
from training.mixture import Mixture
from training.policy_loss import policy_loss
from training.policy_terms import make_terms, plain_weights, require_losses, write_beside
from training.prepare import Mode, prepare
from training.settings import PolicySettings
from training.start import padded_vocabulary as padded_vocabulary
from training.streaming import MEMORY, Frames


def train_policy(
    settings: PolicySettings,
    dataset: Path | Mixture,
    labels: Path | None,
    init: Path | None,
    out: Path,
    mode: Mode,
    fast: Path | None = None,
    frames: Frames = MEMORY,
) -> Manifest:
    """Train on every frame of `dataset`, a LeRobot dataset or a mixture of several, and publish a checkpoint at `out`.

    mode: "imitation" marks every frame positive (pi*0.6 algorithm 1, line 5: the SFT stage), "recap" takes the
    indicators of `labels` (a folder of `recap label`), "filtered" only the frames that are positive there: the control
    that tells what the labels do from what the conditioning does. init: checkpoint whose weights, tokenizer and
    normalisation are the start; its sizes are kept. fast: folder of a FAST tokenizer, whose action tokens the backbone
    learns beside the expert (`training.policy_loss`). frames: where decoded images are kept.
    """
    require_losses(settings, fast, init, mixture=isinstance(dataset, Mixture))
    run = prepare(settings, dataset, labels, init, mode, frames)
    policy, files = run.policy, run.files
    loader = Loader(
        with_groups(run.table, settings.losses.action_groups),
        files.tokenizer,
        chunk=policy.config.chunk,
        dropout=settings.dropout,
        shift=settings.shift,
        seed=settings.fit.seed,
    )
    terms = make_terms(policy, settings, fast, init, loader, files.stats["action"])
    parents = run.parents | policy_terms.parents(terms)
    work = out.with_name(out.name + ".work")
    average = fit(
        policy,
        lambda step, generator, part: policy_loss(
            policy, loader(run.rows(step), step, part=part), settings.draws, generator, settings.fit.precision, terms
        ),
        settings.fit,
        work,
        what=f"policy ({mode})",
        identity={"mode": mode, "parents": parents, "settings": asdict(settings), **run.parameters},
        parts=True,
    )
    shares = {str(i): float((run.table.indicator == i).mean()) for i in (-1, 0, 1)}

    def write() -> Manifest:
        with publish(out) as folder:
            config = {**policy.config.to_json(), **run.served()}
            weights = plain_weights(policy, settings, average.shadow)
            write_checkpoint(folder, weights, config, files.spec, files.tokenizer, files.stats)
            for name, content in run.extra.items():
                (folder / name).write_text(json.dumps(content, indent=1) + "\n")
            write_beside(folder, policy, settings, terms, average.shadow, init)
            (folder / "metrics.jsonl").write_text((work / "metrics.jsonl").read_text())
            manifest = write_manifest(
                folder,
                "policy",
                parents=parents,
                parameters={"mode": mode, **asdict(settings), **run.parameters, **_origin(init)},
                metrics={
                    "frames": len(run.table),
                    "indicator_share": shares,
                    "epochs": settings.fit.steps * settings.fit.rows_per_step / run.frames,
                    **run.metrics,
                    **policy_terms.metrics(terms),
                },
            )
        forget_state(work)
        return manifest

    return once(out, write, pick_device(settings.fit.device))


def _origin(init: Path | None) -> dict[str, str]:
    """What an export to LeRobot needs to know of the checkpoint that training started from."""
    name = read_manifest(init).parameters.get("vlm_name") if init else None
    return {"vlm_name": name} if name else {}
