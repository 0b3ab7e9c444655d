"""Rollout logs become a dataset that holds exactly what was recorded."""

import json

import numpy as np
import pytest
from recap_client.rollout import read_rollout
from sample_rollouts import SPEC, record, record_mixed

from recap_model.manifest import verify
from training.dataset import open_dataset
from training.ingest import PROVENANCE, IngestError, find, ingest, rollouts_hash, survey


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("ingest")
    record_mixed(place / "a", 5)
    record(place / "b", 20, task="close it", success=False)
    ingest(survey([place / "a", place / "b"]), place / "dataset")
    return place


def test_every_array_comes_back_as_it_was_recorded(folder):
    dataset = open_dataset(folder / "dataset")
    recordings = [read_rollout(path) for path in find([folder / "a", folder / "b"])]
    assert len(dataset.episodes) == len(recordings) == 6
    for index, (episode, recorded) in enumerate(zip(dataset.episodes, recordings, strict=True)):
        assert (episode.index, episode.task, episode.success) == (index, recorded.task, recorded.success)
        assert episode.demonstration == recorded.demonstration and episode.fps == 20
        np.testing.assert_array_equal(episode.state, recorded.state)
        np.testing.assert_array_equal(episode.action, recorded.action)
        np.testing.assert_array_equal(episode.intervention, recorded.intervention)
        images = episode.images()
        assert sorted(images) == ["front", "top"]
        for name, frames in images.items():
            np.testing.assert_array_equal(frames, recorded.images[name])
        assert episode.reward.tolist() == [-1.0] * (len(episode) - 1) + [0.0 if recorded.success else -0.0]
        assert episode.extra["next.done"].tolist() == [False] * (len(episode) - 1) + [True]


def test_the_manifest_counts_and_names_its_parents(folder):
    manifest = verify(folder / "dataset", "dataset")
    assert manifest.metrics["episodes"] == 6 and manifest.metrics["frames"] == open_dataset(folder / "dataset").frames
    assert manifest.metrics["tasks"] == {"open it": {"episodes": 3, "successes": 2},
                                         "close it": {"episodes": 3, "successes": 2}}  # fmt: skip
    assert manifest.parents["rollouts"] == rollouts_hash(survey([folder / "a", folder / "b"]).sources)
    rows = json.loads((folder / "dataset" / PROVENANCE).read_text())
    assert [row["seed"] for row in rows] == [0, 1, 2, 3, 4, 20] and rows[0]["style"] == "fast"


def test_the_spec_travels_with_the_tasks_that_occur(folder):
    spec = open_dataset(folder / "dataset").spec
    assert spec.cameras == SPEC.cameras and spec.action == SPEC.action
    assert spec.tasks == ("close it", "open it")


def test_lerobot_itself_reads_the_dataset(folder):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    ours = open_dataset(folder / "dataset")
    theirs = LeRobotDataset("local/any", root=folder / "dataset")
    assert (theirs.num_episodes, theirs.num_frames, theirs.fps) == (6, ours.frames, 20)
    row = len(ours.episodes[0]) + 2
    item = theirs[row]
    episode = ours.episodes[1]
    assert item["task"] == episode.task and int(item["episode_index"]) == 1
    np.testing.assert_array_equal(item["observation.state"].numpy(), episode.state[2])
    np.testing.assert_array_equal((item["observation.images.front"].numpy() * 255).round().astype(np.uint8),
                                  episode.images()["front"][2].transpose(2, 0, 1))  # fmt: skip


def test_another_run_gives_the_same_content(folder):
    again = ingest(survey([folder / "a", folder / "b"]), folder / "again")
    assert again.metrics == verify(folder / "dataset").metrics
    one, two = open_dataset(folder / "dataset"), open_dataset(folder / "again")
    np.testing.assert_array_equal(np.concatenate([e.action for e in one.episodes]),
                                  np.concatenate([e.action for e in two.episodes]))  # fmt: skip


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(IngestError, match=r"nowhere: expected a folder of rollouts"):
        survey([tmp_path / "nowhere"])
