"""Two small robots that share nothing but the size of their frames, and datasets of them made by the real recorder."""

from collections.abc import Sequence
from pathlib import Path

from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim
from sample_rollouts import record
from training.ingest import ingest, survey

ARM = RobotSpec(
    "arm",
    (Camera("front", 32, 32), Camera("wrist", 32, 32)),
    tuple(StateDim(name, "rad") for name in ("shoulder", "elbow", "hand")),
    tuple(ActionDim(name, "rad", -1.0, 1.0) for name in ("shoulder", "elbow", "hand")),
    20.0,
    ("open the door", "open the drawer"),
)
CART = RobotSpec(
    "cart",
    (Camera("eye", 32, 32),),
    (StateDim("x", "m"), StateDim("speed", "m/s")),
    (ActionDim("force", "N", -2.0, 2.0),),
    10.0,
    ("the door",),
)


def make_dataset(
    folder: Path, robot: RobotSpec, lengths: Sequence[int] = (6, 8, 7), first: int = 0, name: str = "dataset"
) -> Path:
    """folder/<name> of all episodes of `robot` that were made in `folder`, `lengths` being the new ones, numbered from
    `first`: every third one fails, every second one is a demonstration, and in the others a human takes over once."""
    for number, length in enumerate(lengths, first):
        record(
            folder / "rollouts",
            number,
            length=length,
            success=number % 3 != 2,
            task=robot.tasks[number % len(robot.tasks)],
            human=(2,) if number % 2 else (),
            demonstration=number % 2 == 0,
            spec=robot,
        )
    ingest(survey([folder / "rollouts"]), folder / name)
    return folder / name
