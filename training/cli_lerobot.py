"""`recap import-lerobot` and `recap export-lerobot`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from recap_model.policy.config import PositionRule


@dataclass(frozen=True)
class ImportLerobot:
    """A LeRobot SmolVLA policy -> checkpoint. The robot is described by --spec, --dataset, or --fps and --task."""

    source: tyro.conf.Positional[str]
    """LeRobot policy folder, or its name on the Hugging Face hub."""
    out: Path
    """Checkpoint folder to publish."""
    vlm: str | None = None
    """Folder or hub name of SmolVLM2, for config.json and tokenizer.json. Default: the one that the policy names."""
    spec: Path | None = None
    """robot.json: names, units, limits and rate of the robot."""
    dataset: Path | None = None
    """LeRobot dataset that describes the robot; also gives statistics to a policy that has none."""
    fps: float | None = None
    """Control rate in Hz, when neither --spec nor --dataset says it."""
    task: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT"), tyro.conf.UseAppendAction] = ()
    """Language instruction that the policy knows; may be given several times."""
    cameras: tuple[str, ...] = ()
    """Cameras that the robot has, as NAME or NAME=ROBOT_NAME. Default: all of the policy's."""
    positions: PositionRule | None = None
    """How patch positions were computed in training. Default: bfloat16 for weights stored so, else float32."""


@dataclass(frozen=True)
class ExportLerobot:
    """Checkpoint -> folder that LeRobot's `SmolVLAPolicy.from_pretrained` opens, with its processors."""

    checkpoint: tyro.conf.Positional[Path]
    out: Path
    """Folder to write."""
    vlm_name: str | None = None
    """SmolVLM2 that the folder shall name. Default: the one imported with, else a folder `vlm` written inside."""


def import_lerobot(argv: list[str]) -> int:
    """Import a policy and publish its checkpoint."""
    args = tyro.cli(ImportLerobot, args=argv, prog="recap import-lerobot", description=ImportLerobot.__doc__)
    from training.lerobot_import import import_policy

    manifest = import_policy(
        args.source,
        args.out,
        vlm=args.vlm,
        spec=args.spec,
        dataset=args.dataset,
        fps=args.fps,
        tasks=args.task,
        cameras=args.cameras,
        positions=args.positions,
        note=_note,
    )
    print(f"{args.out}: {manifest.kind} {manifest.hash[:12]}")
    return 0


def export_lerobot(argv: list[str]) -> int:
    """Write a folder for LeRobot."""
    args = tyro.cli(ExportLerobot, args=argv, prog="recap export-lerobot", description=ExportLerobot.__doc__)
    from training.lerobot_export import export_policy

    export_policy(args.checkpoint, args.out, vlm_name=args.vlm_name, note=_note)
    print(f"{args.out}: open it with lerobot's SmolVLAPolicy.from_pretrained")
    return 0


def _note(text: str) -> None:
    print(f"note: {text}")
