"""`recap data merge`, `recap data convert`, `recap data stats`, `recap data check`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from training.data_check import Report
    from training.data_stats import DatasetStats


@dataclass(frozen=True)
class Merge:
    """Several LeRobot v3.0 datasets of one robot -> one, with every column. The sources are not modified."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Dataset folders, at least two; cameras, dimensions, units, limits and fps must be the same."""
    out: Path
    """Dataset folder to make; it must not exist."""
    cameras: Literal["keep", "image", "video"] = "keep"
    """keep: copy images and video files as they are. image: all as PNG, lossless from here on. video: encode images."""
    fill_missing: bool = False
    """Fill in a column that only some datasets have; without it that is an error that says what would be filled in."""


def merge(argv: list[str]) -> int:
    """Datasets -> one dataset."""
    args = tyro.cli(Merge, args=argv, prog="recap data merge", description=Merge.__doc__)
    from training.data_merge import merge as write
    from training.data_merge_plan import plan_merge

    console = Console()
    plan = plan_merge(args.datasets, cameras=args.cameras, fill_missing=args.fill_missing)
    for source, filled in plan.fills.items():
        for column, words in filled.items():
            console.print(f"[yellow]filled in[/] {source}: {column}: {words}", highlight=False, soft_wrap=True)
    total = len(plan.episodes())
    manifest = write(
        plan, args.out, progress=lambda items: track(items, "merging episodes", total=total, console=console)
    )
    table = Table("dataset", "episodes", "frames")
    for source_ in plan.sources:
        table.add_row(source_.name, str(len(source_.data.episodes)), str(source_.data.frames))
    console.print(table)
    cameras = ", ".join(f"{name.split('.')[-1]} as {kind}" for name, kind in plan.cameras.items())
    console.print(
        f"{args.out}: {manifest.metrics['episodes']} episodes, {manifest.metrics['frames']} frames; {cameras}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


@dataclass(frozen=True)
class Convert:
    """A LeRobot v3.0 copy of a v2.1 dataset, by LeRobot's own converter. The original is not modified."""

    dataset: Annotated[Path, tyro.conf.Positional]
    """The v2.1 dataset."""
    out: Path
    """Dataset folder to make; it must not exist."""


def convert(argv: list[str]) -> int:
    """v2.1 -> v3.0."""
    args = tyro.cli(Convert, args=argv, prog="recap data convert", description=Convert.__doc__)
    require_v21(args.dataset, args.out)
    from training.dataset import convert_v21, open_dataset

    args.out.parent.mkdir(parents=True, exist_ok=True)
    convert_v21(args.dataset, args.out)
    dataset = open_dataset(args.out)
    Console().print(
        f"{args.out}: LeRobot v3.0 copy, {len(dataset.episodes)} episodes, {dataset.frames} frames",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def require_v21(dataset: Path, out: Path) -> None:
    """Refuse what LeRobot's converter would stumble over, before anything is copied. Raises DatasetError."""
    from training.columns import DatasetError

    if out.exists():
        raise DatasetError(f"{out}: expected a folder that does not exist yet for the converted copy, got one")
    info = dataset / "meta" / "info.json"
    if not info.is_file():
        raise DatasetError(f"{dataset}: expected a LeRobot v2.1 dataset (a folder with meta/info.json), got none")
    version = json.loads(info.read_text()).get("codebase_version")
    if version != "v2.1":
        hint = "; it needs no conversion" if str(version).startswith("v3.") else "; LeRobot converts v2.1 only"
        raise DatasetError(f"{dataset}: codebase_version: expected v2.1, got {version}{hint}")
    files = [f"meta/{name}.jsonl" for name in ("tasks", "episodes", "episodes_stats")]
    missing = [name for name in files if not (dataset / name).is_file()]
    if missing or not any((dataset / "data").glob("*/*.parquet")):
        missing += [] if any((dataset / "data").glob("*/*.parquet")) else ["data/*/*.parquet"]
        raise DatasetError(f"{dataset}: expected the files of a v2.1 dataset, got none of {', '.join(missing)}")


@dataclass(frozen=True)
class Stats:
    """Mean, std, min, max, q01 and q99 of every state and action dimension, and what looks wrong in them."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Dataset folders."""
    json: Path | None = None
    """Write the numbers to this file as well: a list with one entry for each dataset."""


def stats(argv: list[str]) -> int:
    """Dataset -> normalisation statistics."""
    args = tyro.cli(Stats, args=argv, prog="recap data stats", description=Stats.__doc__)
    from training.data_stats import dataset_stats
    from training.dataset import open_dataset

    _some(args.datasets)
    results = [dataset_stats(open_dataset(folder)) for folder in args.datasets]
    console = Console()
    for result in results:
        _print_stats(console, result)
    if args.json is not None:
        _write(args.json, [result.to_json() for result in results])
    return 0


def _print_stats(console: Console, result: "DatasetStats") -> None:
    from training.data_stats import FIGURES

    table = Table(title=f"{result.dataset}: {result.episodes} episodes, {result.frames} frames")
    for column in ("dimension", "unit", *FIGURES):
        table.add_column(column, justify="right" if column in FIGURES else "left", overflow="fold")
    for row in result.rows:
        table.add_row(
            _plain(f"{row.quantity}[{row.name}]"), row.unit, *(f"{row.figures[figure]:.4g}" for figure in FIGURES)
        )
    console.print(table)
    for text in result.warnings:
        console.print(f"[bold yellow]warning[/] {text}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Check:
    """List everything that is wrong with datasets, broken ones included. Exit code 1 when there is an error."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Dataset folders."""
    json: Path | None = None
    """Write the problems to this file as well: a list with one entry for each dataset."""


def check(argv: list[str]) -> int:
    """Dataset -> its problems."""
    args = tyro.cli(Check, args=argv, prog="recap data check", description=Check.__doc__)
    from training.data_check import check_dataset

    _some(args.datasets)
    console = Console()
    reports = [
        check_dataset(
            folder, lambda files: track(files, "reading images", console=console, disable=not console.is_terminal)
        )
        for folder in args.datasets
    ]
    for report in reports:
        _print_report(console, report)
    if args.json is not None:
        _write(args.json, [report.to_json() for report in reports])
    return int(any(report.errors for report in reports))


def _print_report(console: Console, report: "Report") -> None:
    if report.problems:
        table = Table()
        for column in ("", "check", "episode", "column", "problem"):
            table.add_column(column, overflow="fold")
        for problem in report.problems:
            table.add_row(
                f"[bold red]{problem.severity}[/]" if problem.severity == "error" else f"[yellow]{problem.severity}[/]",
                problem.check,
                "" if problem.episode is None else str(problem.episode),
                _plain(problem.column or ""),
                _plain(problem.text),
            )
        console.print(table)
    warnings = len(report.problems) - report.errors
    console.print(
        f"{report.dataset}: {report.episodes} episodes, {report.frames} frames, {report.errors} errors, {warnings} "
        "warnings",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _plain(text: str) -> str:
    """Text whose brackets rich takes literally."""
    return text.replace("[", r"\[")


def _some(folders: Sequence[Path]) -> None:
    from training.columns import DatasetError

    if not folders:
        raise DatasetError("expected at least one dataset folder, got none")


def _write(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
