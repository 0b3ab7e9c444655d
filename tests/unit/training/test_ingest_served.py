"""What ingest makes of recordings of the policy service."""

from pathlib import Path

import numpy as np
import pytest

from repository_factory import build_repository
from served_requests import HZ, drive, recording
from service_harness import policy_server
from training.dataset import open_dataset
from training.ingest import IngestError, ingest, survey


def test_ingest_takes_what_the_service_saw_whole_and_only_when_asked(tmp_path: Path) -> None:
    kept, models = tmp_path / "kept", build_repository(tmp_path / "models", models=("policy",))
    with policy_server(models, record=recording(kept)) as served:
        replies = drive(served.url(), 6)
        drive(served.url(), 6, episode="e2", period=4 / HZ)  # a robot that executes four actions of each chunk
    with pytest.raises(IngestError, match="sees neither the executed actions nor the steps between two requests"):
        survey([kept])
    found = survey([kept], served=True)
    assert len(found.sources) == len(found.left) == 1
    assert "expected a request at every control step (0.050 s), got one in 0.200 s" in found.left[0].reason
    ingest(found, tmp_path / "dataset")
    dataset = open_dataset(tmp_path / "dataset")
    assert (len(dataset.episodes), dataset.frames) == (1, 6)
    episode = dataset.episodes[0]
    np.testing.assert_array_equal(episode.action, [reply["actions"][0] for reply in replies])
