"""A small real dataset of 64 px frames, with returns, made by the real recorder, writer and label code."""

from pathlib import Path

from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim
from sample_rollouts import record
from training.dataset import open_dataset
from training.ingest import ingest, survey
from training.labels import make_returns

SPEC = RobotSpec(
    "toy",
    (Camera("front", 32, 32), Camera("top", 32, 32)),
    (StateDim("x", "m"), StateDim("grip", "1")),
    (ActionDim("dx", "1", -1.0, 1.0), ActionDim("grip", "1", -1.0, 1.0)),
    20.0,
    ("open it", "close it"),
)


def make_data(folder: Path, episodes: int = 8) -> Path:
    """folder/dataset and folder/returns; returns `folder`."""
    for number in range(episodes):
        record(
            folder / "rollouts",
            number,
            length=6 + number,
            success=number % 3 != 2,
            task=SPEC.tasks[number % 2],
            human=(3, 4) if number % 4 == 1 else (),
            demonstration=number % 4 == 0,
            spec=SPEC,
        )
    ingest(survey([folder / "rollouts"]), folder / "dataset")
    make_returns(open_dataset(folder / "dataset"), folder / "returns")
    return folder
