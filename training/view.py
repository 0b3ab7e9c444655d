"""Episodes to look at: `recap data view` makes one page with film strips, values, advantages, labels and takeovers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_model import conditioning
from recap_model.report import html
from training.dataset import Dataset, Episode
from training.labels import load_labels, load_returns, read_values
from training.view_chart import Tracks, episode_chart
from training.view_page import inline_svg, light_and_dark

NOTE = (
    "Every frame stands over its own moment. The band called label is green where the frame is positive, red where it "
    "is negative, grey without a label; human takeovers are hatched. Advantage above the threshold is shaded green."
)


class ViewError(ValueError):
    """There is no such episode to look at."""


@dataclass(frozen=True)
class Chosen:
    """An episode to show. place: its position in the dataset; why: "best of its task", ..., or "" when asked for."""

    place: int
    why: str = ""


Progress = Callable[[Sequence[Chosen]], Iterable[Chosen]]


def read_tracks(
    dataset: Dataset, *, labels: Path | None = None, values: Path | None = None, returns: Path | None = None
) -> Tracks:
    """What the given label folders say of every frame, each [F] in dataset order. `labels` brings values and returns
    with it; `values` and `returns` go before them. What imported labels do not know of any frame is None.
    Raises LabelError, ManifestError for folders of another dataset."""
    marked = None if labels is None else load_labels(labels, dataset)
    value = None if marked is None else _known(marked.values)
    target = None if marked is None else _known(marked.returns)
    if values is not None:
        value = read_values(values, dataset).values
    if returns is not None:
        target = load_returns(returns, dataset).values
    if marked is None:
        return Tracks(value, target)
    return Tracks(value, target, _known(marked.advantage), _known(marked.threshold), marked.indicator)


def _known(column: NDArray[np.float64]) -> NDArray[np.float64] | None:
    return column if np.isfinite(column).any() else None


def rows_of(dataset: Dataset) -> list[slice]:
    """The rows of every episode in arrays [F] of the dataset."""
    stops = np.cumsum([len(episode) for episode in dataset.episodes]).tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def choose(dataset: Dataset, tracks: Tracks, episodes: Sequence[int] | None = None) -> list[Chosen]:
    """The asked-for episodes, by their index, in that order; or the best, the median and the worst of every task.

    Order within a task: success before unknown before failure; then the return of the first frame (the shorter episode
    where no returns are given), then the mean value. Raises ViewError for an index that the dataset does not have.
    """
    if episodes is not None:
        place = {episode.index: number for number, episode in enumerate(dataset.episodes)}
        missing = [index for index in episodes if index not in place]
        if missing:
            known = sorted(place)
            raise ViewError(
                f"--episodes: expected indices of {dataset.root} ({known[0]} to {known[-1]}, {len(known)} episodes), "
                f"got {', '.join(map(str, missing))}"
            )
        return [Chosen(place[index]) for index in dict.fromkeys(episodes)]
    rows = rows_of(dataset)
    found = []
    for task in dict.fromkeys(episode.task for episode in dataset.episodes):
        own = [number for number, episode in enumerate(dataset.episodes) if episode.task == task]
        order = sorted(own, key=lambda number: _worth(dataset.episodes[number], tracks.part(rows[number])))
        picks = {order[-1]: "best of its task"}
        picks.setdefault(order[len(order) // 2], "median of its task")
        picks.setdefault(order[0], "worst of its task")
        found += [Chosen(number, why) for number, why in picks.items()]
    return found


def _worth(episode: Episode, tracks: Tracks) -> tuple[float, float, float]:
    outcome = {True: 1.0, None: 0.0, False: -1.0}[episode.success]
    start = np.nan if tracks.returns is None else float(tracks.returns[0])
    mean = np.nan if tracks.value is None else float(tracks.value.mean())
    return outcome, start if np.isfinite(start) else -float(len(episode)), mean if np.isfinite(mean) else 0.0


def build(dataset: Dataset, tracks: Tracks, chosen: Sequence[Chosen], progress: Progress = iter) -> str:
    """The page as text: one section an episode, pictures embedded. progress: wraps the iteration over the episodes."""
    rows = rows_of(dataset)
    sections = []
    for item in progress(chosen):
        episode, known = dataset.episodes[item.place], tracks.part(rows[item.place])
        images = episode.images()  # decoded here and let go with the section: one episode at a time is in memory
        chart = episode_chart(images, known, intervention=episode.intervention, fps=episode.fps)
        caption = f"episode {episode.index}: {', '.join(images)}; {len(episode)} frames"
        sections.append(html.Section(title(episode), inline_svg(chart, caption) + facts(episode, known), item.why))
    shown = f"{len(chosen)} of {len(dataset.episodes)} episodes"
    head = html.page(
        f"Dataset {dataset.root.resolve().name}", f"{shown}; dataset {dataset.hash[:12]}", tiles(dataset, tracks),
        [html.Section("How to read this", html.paragraph(NOTE)), *sections], "made by recap data view",
    )  # fmt: skip
    return light_and_dark(head)


def title(episode: Episode) -> str:
    """Episode, task, outcome and length in one line."""
    outcome = {True: "success", False: "failure", None: "outcome not known"}[episode.success]
    kind = ", demonstration" if episode.demonstration else ""
    return f"Episode {episode.index}: {episode.task.strip()}: {outcome} after {len(episode) / episode.fps:.1f} s{kind}"


def facts(episode: Episode, tracks: Tracks) -> str:
    """A table with the episode's figures."""
    cells: dict[str, Any] = {"frames": len(episode), "taken over by a human": _share(episode.intervention)}
    if tracks.returns is not None:
        cells["return at the start"] = float(tracks.returns[0])
    if tracks.value is not None:
        cells["value at the start"] = float(tracks.value[0])
        cells["value at the end"] = float(tracks.value[-1])
    if tracks.advantage is not None:
        cells["mean advantage"] = float(tracks.advantage.mean())
    if tracks.indicator is not None:
        cells["positive"] = _share(tracks.indicator == conditioning.POSITIVE)
        cells["negative"] = _share(tracks.indicator == conditioning.NEGATIVE)
    return html.table(list(cells), [list(cells.values())])


def tiles(dataset: Dataset, tracks: Tracks) -> list[html.Tile]:
    """The dataset in a few numbers."""
    outcomes = [episode.success for episode in dataset.episodes]
    tasks = len({episode.task for episode in dataset.episodes})
    human = np.concatenate([episode.intervention for episode in dataset.episodes])
    minutes = sum(len(episode) / episode.fps for episode in dataset.episodes) / 60
    found = [
        html.Tile("episodes", str(len(outcomes)), f"of {tasks} task{'s' * (tasks != 1)}"),
        html.Tile("frames", str(dataset.frames), f"{minutes:.1f} minutes"),
        html.Tile("successes", str(outcomes.count(True)),
                  f"{outcomes.count(False)} failures, {outcomes.count(None)} not known"),
        html.Tile("frames under human takeover", _share(human)),
    ]  # fmt: skip
    if tracks.indicator is not None:
        share = _share(tracks.indicator == conditioning.POSITIVE)
        found.append(html.Tile("of the frames are positive", share, "over the whole dataset"))
    return found


def _share(mask: Any) -> str:
    return f"{float(np.mean(mask)):.0%}"
