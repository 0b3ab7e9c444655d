"""A LeRobot policy with its processors, the same imported, and a small dataset."""

from pathlib import Path

import pytest

from lerobot_checkpoints import FRAME, TASK, save, statistics
from lerobot_smolvla import lerobot_policy, write_vlm
from recap_model.cli import main
from trained import make_data


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A LeRobot checkpoint with statistics. Only read it."""
    root = tmp_path_factory.mktemp("theirs")
    return save(lerobot_policy(write_vlm(root / "vlm"), frame=FRAME), root / "policy", statistics())


@pytest.fixture(scope="module")
def imported(theirs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "checkpoint"
    tasks = ["--task", TASK, "--task", "close it"]
    assert main(["import-lerobot", str(theirs), "--out", str(out), "--fps", "30", *tasks]) == 0
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))
