"""`recap data view`, `recap label preview`, `recap offline`: what to look at before and after a training."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import track


@dataclass(frozen=True)
class View:
    """One page to look at a dataset: film strips of all cameras, values, advantages, labels and takeovers."""

    dataset: tyro.conf.Positional[Path]
    """LeRobot dataset folder."""
    out: Path
    """Page to write (.html), self-contained: it opens in any browser, offline."""
    labels: Path | None = None
    """Folder of `recap label`: value, return, advantage, threshold and indicator of every frame."""
    values: Path | None = None
    """Folder of values, where there are no labels yet (or to show others)."""
    returns: Path | None = None
    """Folder of `recap returns`, where there are no labels yet."""
    episodes: tuple[int, ...] | None = None
    """Indices of the episodes to show; the best, the median and the worst of every task by default."""
    rerun: Path | None = None
    """Also write a Rerun recording (.rrd) of these episodes; needs the package rerun-sdk."""


@dataclass(frozen=True)
class LabelPreview:
    """What is positive with these labels, as a film: the clearest and the closest decisions of every task."""

    dataset: Path
    labels: Path
    """Folder of `recap label`."""
    out: Path
    """Film to write (.mp4); a contact sheet with the same name and .png lies beside it."""
    per_kind: int = 3
    """Clips of each kind and task: most positive, borderline, most negative."""
    seconds: float = 2.0
    """Length of a clip."""


@dataclass(frozen=True)
class Offline:
    """How far a policy's chunks are from recorded actions, and whether its prompt matters. JSON on the last line."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a policy (`recap train policy`, `recap import-lerobot`)."""
    dataset: Path
    labels: Path | None = None
    """Folder of `recap label`: errors are split by the label of the frame."""
    beta: float = 1.0
    """Guidance of the positive and the negative prompt, as served; 1 is none."""
    indicator: tuple[Literal["positive", "negative", "none"], ...] = ("positive", "negative", "none")
    """Prompts to give the policy, one or several."""
    frames: int = 512
    """Frames to look at, at most; drawn by --seed."""
    seed: int = 0
    noise_seeds: tuple[int, ...] = (0, 1)
    """One chunk is sampled for each; the noise of a frame is the same for every prompt. With two or more the effect of
    another noise stands beside that of another prompt."""
    batch_size: int = 32
    device: str = "auto"
    """auto takes a GPU if torch sees one; else cpu, cuda, cuda:1, ..."""
    out: Path | None = None
    """Also write a page with bars (.html)."""


def view(argv: list[str]) -> int:
    """`recap data view`."""
    args = tyro.cli(View, args=argv, prog="recap data view", description=View.__doc__)
    from recap_model.report import html
    from training.dataset import open_dataset
    from training.view import build, choose, read_tracks
    from training.view_rerun import require_rerun, write_rerun

    if args.rerun is not None:
        require_rerun()
    console = Console()
    dataset = open_dataset(args.dataset)
    tracks = read_tracks(dataset, labels=args.labels, values=args.values, returns=args.returns)
    chosen = choose(dataset, tracks, args.episodes)
    html.write(args.out, build(dataset, tracks, chosen, _bar(console, "drawing episodes")))
    console.print(f"{args.out}: {len(chosen)} of {len(dataset.episodes)} episodes", soft_wrap=True, highlight=False)
    if args.rerun is not None:
        frames = write_rerun(dataset, tracks, chosen, args.rerun, _bar(console, "writing the recording"))
        console.print(f"{args.rerun}: {frames} frames", soft_wrap=True, highlight=False)
    return 0


def label_preview(argv: list[str]) -> int:
    """`recap label preview`."""
    args = tyro.cli(LabelPreview, args=argv, prog="recap label preview", description=LabelPreview.__doc__)
    from training.dataset import open_dataset
    from training.labels import load_labels
    from training.preview import write_preview

    console = Console()
    dataset = open_dataset(args.dataset)
    made = write_preview(
        dataset, load_labels(args.labels, dataset), args.out,
        per_kind=args.per_kind, seconds=args.seconds, progress=_bar(console, "drawing tasks"),
    )  # fmt: skip
    console.print(f"{made.video}: {len(made.moments)} clips; {made.sheet}: the same as one picture",
                  soft_wrap=True, highlight=False)  # fmt: skip
    return 0


def offline(argv: list[str]) -> int:
    """`recap offline`."""
    args = tyro.cli(Offline, args=argv, prog="recap offline", description=Offline.__doc__)
    from training.offline import OfflineSettings, offline_error
    from training.offline_report import build_page, dimension_table, effect_lines, summary_table, to_json

    settings = OfflineSettings(
        tuple(dict.fromkeys(args.indicator)), args.beta, args.frames, args.seed, args.noise_seeds, args.batch_size,
        args.device,
    )  # fmt: skip
    console = Console()
    report = offline_error(args.checkpoint, args.dataset, args.labels, settings, _bar(console, "predicting"))
    console.print(summary_table(report))
    console.print(dimension_table(report))
    for line in effect_lines(report):
        console.print(line, soft_wrap=True, highlight=False)
    if args.out is not None:
        from recap_model.report import html

        html.write(args.out, build_page(report))
        console.print(str(args.out), soft_wrap=True, highlight=False)
    print(json.dumps(to_json(report), allow_nan=False))
    return 0


def _bar(console: Console, what: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    return lambda items: track(items, what, total=len(items), console=console)
