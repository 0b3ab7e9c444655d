"""Small recordings and datasets for tests, made by the real recorder and the real writer."""

from pathlib import Path

import numpy as np

from recap_client.record import EpisodeInfo, Outcome, Recorder, StepRecord
from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim
from recap_model.advantage import LabelRules
from training.dataset import Dataset, open_dataset
from training.ingest import ingest, survey
from training.labels import load_returns, make_labels, make_returns, write_values

SPEC = RobotSpec(
    "toy",
    (Camera("front", 12, 16), Camera("top", 10, 10)),
    (StateDim("x", "m"), StateDim("grip", "1")),
    (ActionDim("dx", "1", -1.0, 1.0), ActionDim("grip", "1", -1.0, 1.0)),
    20.0,
    ("open it", "close it"),
)


def record(
    folder: Path,
    number: int,
    *,
    length=6,
    success=True,
    task="open it",
    human=(),
    demonstration=False,
    spec=SPEC,
    close=True,
    nan_at=None,
) -> Path:
    """Record one episode; `human` lists the steps of an intervention. close=False leaves it as a crash would."""
    random = np.random.default_rng(number)
    path = folder / f"episode-{number:03d}.mcap"
    info = EpisodeInfo(
        spec=spec,
        task=task,
        task_name=task.replace(" ", "-"),
        seed=number,
        episode=f"e{number}",
        demonstration=demonstration,
        style="fast" if demonstration else None,
    )
    recorder = Recorder(path, info)
    for step in range(length):
        state = random.normal(size=len(spec.state)).astype(np.float32)
        if step == nan_at:
            state[1] = np.nan
        recorder.step(
            StepRecord(
                step=step,
                t=step / spec.control_hz,
                state=state,
                action=random.uniform(-1, 1, len(spec.action)).astype(np.float32),
                images={c.name: random.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in spec.cameras},
                intervention=step in human,
            )
        )
    recorder.close(Outcome(success if close else None, length, "success" if success else "timeout"))
    if recorder.error:
        raise recorder.error
    return path


def truncate(path: Path, share: float = 0.6) -> None:
    """Cut a file as a crash or a full disk would."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def record_mixed(folder: Path, episodes: int = 8) -> Path:
    """Two tasks, demonstrations and rollouts, successes and failures, some interventions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(episodes):
        demonstration = number % 4 == 0
        record(
            folder,
            number,
            length=5 + number,
            success=number % 3 != 2,
            task=SPEC.tasks[number % 2],
            human=(3, 4) if number % 4 == 1 else (),
            demonstration=demonstration,
        )
    return folder


def make_dataset(folder: Path, episodes: int = 8) -> Path:
    """A dataset of `record_mixed`, at folder/dataset."""
    ingest(survey([record_mixed(folder / "rollouts", episodes)]), folder / "dataset")
    return folder / "dataset"


def make_labelled(root: Path) -> Dataset:
    """A dataset with returns/, values/ (a noisy truth) and advantage/ beside it in `root`."""
    dataset = open_dataset(make_dataset(root))
    make_returns(dataset, root / "returns")
    truth = load_returns(root / "returns", dataset)
    value = np.clip(truth.values + np.random.default_rng(0).normal(0, 0.1, dataset.frames), -1, 0)
    write_values(root / "values", *dataset.keys(), value, np.zeros(dataset.frames), dataset_hash=dataset.hash,
                 critic_hash="c", returns_hash=truth.hash)  # fmt: skip
    make_labels(dataset, root / "returns", root / "values", root / "advantage", LabelRules(n=3))
    return dataset
