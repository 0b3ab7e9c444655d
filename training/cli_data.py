"""`recap ingest`, `recap returns`, `recap label`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from recap_model.audit import Audit


@dataclass(frozen=True)
class Ingest:
    """Turn rollout logs (MCAP), or a copy of a LeRobot v2.1 dataset, into a LeRobot v3.0 dataset."""

    out: Path
    """Dataset folder to publish; an old one is replaced when the new one is complete."""
    rollouts: tuple[Path, ...] = ()
    """Folders of rollouts; several become one dataset."""
    lerobot: Path | None = None
    """A LeRobot v2.1 dataset to convert instead; it is not modified."""
    keep_incomplete: bool = False
    """Take recordings that were interrupted, or whose outcome is unknown, as failures; without it they are left out."""
    skip_invalid: bool = False
    """Leave out files that cannot be read or hold NaN; without it they stop the ingestion."""
    served: bool = False
    """Take recordings of the policy service (`recap serve --record`) too, of robots that asked at every control step;
    the action sent stands for the action executed."""
    video: bool = False
    """Store cameras as video (small, lossy) instead of lossless images."""


def ingest(argv: list[str]) -> int:
    """Rollouts -> dataset."""
    args = tyro.cli(Ingest, args=argv, prog="recap ingest", description=Ingest.__doc__)
    from training.ingest import IngestError, survey
    from training.ingest import ingest as write

    console = Console()
    if bool(args.rollouts) == (args.lerobot is not None):
        raise IngestError("expected either --rollouts FOLDER [FOLDER ...] or --lerobot FOLDER")
    if args.lerobot is not None:
        return _convert(args.lerobot, args.out, console)
    found = survey(
        args.rollouts, keep_incomplete=args.keep_incomplete, skip_invalid=args.skip_invalid, served=args.served
    )
    for item in found.left:
        console.print(f"[yellow]left out[/] {item.path}: {item.reason}", highlight=False, soft_wrap=True)
    manifest = write(
        found,
        args.out,
        video=args.video,
        progress=lambda items: track(items, "writing episodes", total=len(found.sources), console=console),
    )
    table = Table("task", "episodes", "successes")
    for task, count in manifest.metrics["tasks"].items():
        table.add_row(task, str(count["episodes"]), str(count["successes"]))
    console.print(table)
    console.print(
        f"{args.out}: {manifest.metrics['episodes']} episodes, {manifest.metrics['frames']} frames", soft_wrap=True
    )
    return 0


def _convert(source: Path, out: Path, console: Console) -> int:
    from training.dataset import convert_v21, open_dataset
    from training.ingest import IngestError

    if out.exists():
        raise IngestError(f"{out}: expected a folder that does not exist yet for the converted copy, got one")
    convert_v21(source, out)
    dataset = open_dataset(out)
    console.print(f"{out}: LeRobot v3.0 copy, {len(dataset.episodes)} episodes, {dataset.frames} frames")
    return 0


@dataclass(frozen=True)
class Returns:
    """Write the normalised return of every frame: how far from success, in units of the longest successful episode."""

    dataset: Path
    out: Path
    """Label folder to publish, for example labels/first/returns."""
    all_successful: bool = False
    """Every episode succeeded (demonstrations without an outcome column)."""
    t_max_quantile: float = 1.0
    """Quantile of the successful episodes' lengths that T_max is, per task; 1 is the longest."""
    c_fail: float | None = None
    """Cost of a failure in control steps; default T_max, which makes every frame of a failure -1."""


def returns(argv: list[str]) -> int:
    """Dataset -> returns."""
    args = tyro.cli(Returns, args=argv, prog="recap returns", description=Returns.__doc__)
    from training.dataset import open_dataset
    from training.labels import make_returns

    manifest = make_returns(
        open_dataset(args.dataset),
        args.out,
        all_successful=args.all_successful,
        t_max_quantile=args.t_max_quantile,
        c_fail=args.c_fail,
    )
    console = Console()
    table = Table("task", "T_max [control steps]")
    for task, steps in manifest.parameters["t_max"].items():
        table.add_row(task, f"{steps:g}")
    console.print(table)
    _warn(console, manifest.metrics["warnings"])
    console.print(
        f"{args.out}: {manifest.metrics['successes']} of {manifest.metrics['episodes']} episodes successful",
        soft_wrap=True,
    )
    return 0


@dataclass(frozen=True)
class Label:
    """Label every frame by its advantage over the critic, and audit the labels."""

    dataset: Path
    out: Path
    """Label folder to publish, for example labels/first/advantage; audit.html lies in it."""
    returns: Path | None = None
    """Folder of `recap returns`."""
    values: Path | None = None
    """Folder of values that `recap train critic --values-out` wrote."""
    from_column: str | None = None
    """A column of the dataset in place of --values. Text (positive, negative, none, as in `adv_ind`) is imported as it
    is; numbers in [-1, 0] are a critic's values."""
    reward_column: str | None = None
    """With values from a column: the column with rewards (`reward_label`) in place of --returns."""
    export_adv_ind: Path | None = None
    """Also write the labels as a parquet file: episode_index, frame_index, adv_ind (positive, negative, none)."""
    preview: Path | None = None
    """Also write a film (.mp4) and a contact sheet (.png) of the most positive, borderline and most negative frames."""
    estimator: Literal["n-step", "gae"] = "n-step"
    """gae: a weighted mean over all look-aheads, by --gamma and --lam, in place of --n."""
    n: int | Literal["episode"] = 50
    """Look-ahead in frames (N); `episode` compares with the whole rest of the episode."""
    gamma: float = 1.0
    """Discount of gae. The critic's values are not discounted, so below 1 standing still pays; there is a warning."""
    lam: float = 0.95
    """Weight of longer look-aheads in gae: 0 is one step, 1 the whole rest of the episode."""
    positive_fraction: float = 0.4
    """Share of autonomous rollout frames that becomes positive, per task."""
    demonstration_fraction: float = 0.3
    """Share of demonstration frames that becomes positive, per task."""
    threshold_over: Literal["all", "successes"] = "all"
    """Frames that the share is of: all, or those of successful episodes."""
    threshold_scope: Literal["task", "dataset"] = "task"
    """A threshold for every task, or one for all of them."""
    threshold_rule: Literal["above", "percentile"] = "above"
    """above: strictly above the threshold, at most the share. percentile: at or above numpy's percentile, as in openpi
    forks."""
    mode: Literal["computed", "expert", "outcome"] = "computed"
    """expert: everything positive. outcome: positive where the episode succeeded (baseline)."""
    interventions: Literal["all", "successes", "computed"] = "all"
    """Human corrections are positive in all episodes, only in successful ones, or only by their advantage."""
    negative_before_intervention: int = 0
    """So many frames before a takeover are negative."""
    failures_negative: bool = False
    """Autonomous frames of failed episodes are negative, whatever their advantage."""


def label(argv: list[str]) -> int:
    """Values -> advantages, indicators, audit."""
    args = tyro.cli(Label, args=argv, prog="recap label", description=Label.__doc__)
    from recap_model.advantage import LabelRules
    from training.dataset import open_dataset
    from training.label_import import export_adv_ind, label_from_column
    from training.labels import LabelError, load_labels, make_labels

    rules = LabelRules(
        n=None if args.n == "episode" else args.n,
        **{field.name: getattr(args, field.name) for field in fields(LabelRules) if field.name != "n"},
    )
    if args.from_column is not None and args.values is not None:
        raise LabelError("expected either --values FOLDER or --from-column NAME, got both")
    dataset = open_dataset(args.dataset)
    if args.from_column is not None:
        _, result = label_from_column(
            dataset, args.from_column, args.out, rules, returns=args.returns, reward_column=args.reward_column
        )
    elif args.returns is None or args.values is None or args.reward_column is not None:
        raise LabelError(
            "expected --returns FOLDER and --values FOLDER; or --from-column NAME for labels or values that lie in the "
            "dataset, then with --returns or --reward-column if they are values"
        )
    else:
        _, result = make_labels(dataset, args.returns, args.values, args.out, rules)
    print_audit(Console(), result)
    print(f"{args.out}: labels, audit.html")
    if args.export_adv_ind is not None:
        export_adv_ind(load_labels(args.out, dataset), dataset, args.export_adv_ind)
        print(f"{args.export_adv_ind}: adv_ind of {dataset.frames} frames")
    if args.preview is not None:
        from training.preview import write_preview

        write_preview(dataset, load_labels(args.out, dataset), args.preview)
        print(f"{args.preview}: preview of the labels")
    return 0


def print_audit(console: Console, result: "Audit") -> None:
    """The audit as a table and its warnings."""
    from recap_model import audit

    table = Table(title="label audit")
    for number, column in enumerate(audit.COLUMNS):
        table.add_column(column, justify="left" if number < 4 else "right", overflow="fold")
    for row in result.rows:
        table.add_row(*audit.cells(row))
    console.print(table)
    share, failed = result.positive_share, result.failed_share
    console.print(f"{share:.0%} of the frames are positive; failed episodes supply {failed:.0%} of the positives")
    _warn(console, result.warnings)


def _warn(console: Console, texts: "tuple[str, ...] | list[str]") -> None:
    for text in texts:
        console.print(f"[bold yellow]warning[/] {text}", highlight=False, soft_wrap=True)
