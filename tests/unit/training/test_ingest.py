"""Rollout logs become a dataset that holds exactly what was recorded."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from recap_client.rollout import read_rollout
from recap_model.manifest import verify
from sample_rollouts import SPEC, record, record_mixed
from training import dataset_writer
from training.dataset import open_dataset
from training.ingest import PROVENANCE, IngestError, find, ingest, rollouts_hash, survey
from training.lerobot_files import features


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
        assert episode.reward.tolist() == [-1.0] * (len(episode) - 1) + [0.0 if recorded.success else -1.0]
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


def test_the_files_are_those_of_lerobot_s_own_writer(folder, tmp_path):
    """Same layout, columns, types and metadata; equal statistics up to LeRobot's estimates of quantiles."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    ours = folder / "dataset"
    theirs = LeRobotDataset.create("local/theirs", fps=20, features=features(SPEC), root=tmp_path / "theirs",
                                   robot_type="toy", use_videos=False)  # fmt: skip
    for path in find([folder / "a", folder / "b"]):
        recorded = read_rollout(path)
        for row in range(recorded.steps):
            last = row == recorded.steps - 1
            theirs.add_frame({
                "observation.state": recorded.state[row], "action": recorded.action[row], "task": recorded.task,
                "observation.images.front": recorded.images["front"][row],
                "observation.images.top": recorded.images["top"][row],
                "intervention": np.array([recorded.intervention[row]], np.int64),
                "success": np.array([recorded.success], np.int64),
                "demonstration": np.array([recorded.demonstration], np.int64),
                "next.reward": np.array([0.0 if last and recorded.success else -1.0], np.float32),
                "next.done": np.array([last]),
            })  # fmt: skip
        theirs.save_episode()
    theirs.finalize()
    for name in ("data/chunk-000/file-000.parquet", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"):
        got, expected = pq.read_table(ours / name), pq.read_table(tmp_path / "theirs" / name)
        assert sorted(map(str, got.schema)) == sorted(map(str, expected.schema)), name
        plain = [column for column in expected.column_names if "images" not in column and "stats/" not in column]
        assert got.select(plain).equals(expected.select(plain)), name
    info, wanted = (json.loads((root / "meta" / "info.json").read_text()) for root in (ours, tmp_path / "theirs"))
    assert info == wanted
    got, expected = (json.loads((root / "meta" / "stats.json").read_text()) for root in (ours, tmp_path / "theirs"))
    assert got.keys() == expected.keys()
    for name, stats in expected.items():
        assert got[name].keys() == stats.keys()
        for key in ("min", "max", "mean", "std", "count"):
            np.testing.assert_allclose(got[name][key], stats[key], atol=2e-4, err_msg=f"{name} {key}")
        spread = np.subtract(stats["max"], stats["min"])
        for key in ("q01", "q10", "q50", "q90", "q99"):
            assert np.shape(got[name][key]) == np.shape(stats[key])
            assert (np.abs(np.subtract(got[name][key], stats[key])) <= 0.01 * spread + 1e-6).all(), f"{name} {key}"


def test_many_data_files_and_episodes_of_one_frame(folder, tmp_path, monkeypatch):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    monkeypatch.setattr(dataset_writer, "_FILE_MB", 1e-6)
    record(tmp_path / "r", 1, length=1)
    ingest(survey([tmp_path / "r", folder / "a"]), tmp_path / "d")
    assert len(list((tmp_path / "d" / "data").rglob("*.parquet"))) == 6
    episodes, theirs = open_dataset(tmp_path / "d").episodes, LeRobotDataset("local/d", root=tmp_path / "d")
    assert [len(episode) for episode in episodes] == [1, 5, 6, 7, 8, 9] and theirs.num_frames == 36
    row = 0
    for episode in episodes:
        frame = (theirs[row]["observation.images.top"].numpy() * 255).round().astype(np.uint8)
        np.testing.assert_array_equal(episode.images()["top"][0], frame.transpose(1, 2, 0))
        row += len(episode)


def test_another_run_gives_the_same_content(folder):
    again = ingest(survey([folder / "a", folder / "b"]), folder / "again")
    assert again.metrics == verify(folder / "dataset").metrics
    one, two = open_dataset(folder / "dataset"), open_dataset(folder / "again")
    np.testing.assert_array_equal(np.concatenate([e.action for e in one.episodes]),
                                  np.concatenate([e.action for e in two.episodes]))  # fmt: skip


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(IngestError, match=r"nowhere: expected a folder of rollouts"):
        survey([tmp_path / "nowhere"])
