"""Datasets made elsewhere are read under the names in use, checked, and never modified."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_v21 import write_v21
from recap_client.spec import Camera
from recap_model.manifest import content_hash
from sample_rollouts import make_dataset
from training.columns import DatasetError
from training.dataset import VideoDatasetWriter, convert_v21, open_dataset
from training.dataset_writer import EpisodeData


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"), 4)


@pytest.fixture
def foreign(made, tmp_path):
    """The dataset as another recorder would leave it: no manifest, no spec, no RECAP columns."""
    root = shutil.copytree(made, tmp_path / "foreign")
    (root / "manifest.json").unlink()
    (root / "meta" / "recap_spec.json").unlink()
    edit(root, lambda table: table.drop_columns(["success", "intervention", "demonstration"]))
    return root


def edit(root, change, where="data"):
    for path in (root / where).glob("chunk-*/file-*.parquet"):
        pq.write_table(change(pq.read_table(path)), path)


def add_column(root, name, values, where="data"):
    edit(root, lambda table: table.append_column(name, pa.array(values[: table.num_rows])), where)


def test_opening_changes_nothing_and_the_hash_is_of_the_content(made, foreign):
    before = content_hash(foreign)
    dataset = open_dataset(foreign)
    [episode.images() for episode in dataset.episodes]
    assert content_hash(foreign) == before
    assert dataset.hash == open_dataset(foreign).hash != open_dataset(made).hash
    add_column(foreign, "success", [1] * dataset.frames)
    assert open_dataset(foreign).hash != dataset.hash


def test_without_recap_columns_the_episodes_are_demonstrations_of_unknown_outcome(foreign):
    dataset = open_dataset(foreign)
    assert [(e.success, e.demonstration, e.intervention.any()) for e in dataset.episodes] == [(None, True, False)] * 4
    assert dataset.spec.camera_names == ("front", "top") and dataset.spec.cameras[0].width == 16
    assert [dim.name for dim in dataset.spec.state] == ["x", "grip"] and dataset.spec.control_hz == 20
    actions = np.concatenate([e.action for e in dataset.episodes])
    np.testing.assert_allclose([d.high for d in dataset.spec.action], actions.max(0), rtol=1e-5)


@pytest.mark.parametrize("column", ["success", "next.success", "is_success"])
@pytest.mark.parametrize("kind", ["constant", "at the end", "boolean"])
def test_frame_outcomes_in_every_spelling(foreign, column, kind):
    lengths = [len(e) for e in open_dataset(foreign).episodes]
    expected = [True, False, True, True]
    values = []
    for length, success in zip(lengths, expected, strict=True):
        values += [0] * (length - 1) + [int(success)] if kind == "at the end" else [int(success)] * length
    add_column(foreign, column, [bool(v) for v in values] if kind == "boolean" else values)
    assert [e.success for e in open_dataset(foreign).episodes] == expected


def test_episode_outcomes_from_the_episode_table(foreign):
    add_column(foreign, "success", [True, False, None, True], "meta/episodes")
    assert [e.success for e in open_dataset(foreign).episodes] == [True, False, None, True]


def test_contradictory_outcome_columns_are_refused(foreign):
    frames = open_dataset(foreign).frames
    add_column(foreign, "next.success", [1] * frames)
    add_column(foreign, "success", [True, True, False, True], "meta/episodes")
    with pytest.raises(DatasetError, match=r"episode 2: .*'meta/episodes success' says failure, 'next.success' says"):
        open_dataset(foreign)


def test_an_outcome_that_changes_its_mind_is_refused(foreign):
    add_column(foreign, "success", [1, 0] + [1] * (open_dataset(foreign).frames - 2))
    with pytest.raises(DatasetError, match=r"episode 0: column 'success': expected one outcome.*got 1 0 1"):
        open_dataset(foreign)


def test_other_recap_columns_are_read(foreign):
    frames = open_dataset(foreign).frames
    add_column(foreign, "reasoning", [f"step {i}" for i in range(frames)])
    add_column(foreign, "adv_ind", [1] * frames)
    add_column(foreign, "intervention", [False, True] + [False] * (frames - 2))
    episode = open_dataset(foreign).episodes[0]
    assert episode.extra["reasoning"][1] == "step 1" and episode.extra["adv_ind"].tolist() == [1] * len(episode)
    assert np.flatnonzero(episode.intervention).tolist() == [1] and not episode.demonstration


def test_nan_in_the_state_is_named(foreign):
    def spoil(table):
        values = np.stack(table.column("observation.state").to_pylist())
        values[3, 1] = np.nan
        place = table.column_names.index("observation.state")
        return table.set_column(place, "observation.state", pa.array(list(values.astype(np.float32))))

    edit(foreign, spoil)
    with pytest.raises(DatasetError, match=r"episode 0, frame 3: observation.state\[grip\]: expected .*got nan"):
        open_dataset(foreign)


def test_flags_other_than_0_and_1_are_refused(foreign):
    add_column(foreign, "intervention", [2] * open_dataset(foreign).frames)
    with pytest.raises(DatasetError, match=r"'intervention': expected 0 or 1, got 2"):
        open_dataset(foreign)


def test_scattered_or_missing_frames_are_refused(foreign):
    edit(foreign, lambda table: pa.concat_tables([table.slice(0, 2), table.slice(3)]))
    with pytest.raises(DatasetError, match="frame_index: expected 0, 1, 2"):
        open_dataset(foreign)


def test_a_dataset_changed_after_its_manifest_is_refused(made, tmp_path):
    root = shutil.copytree(made, tmp_path / "changed")
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(json.dumps({**info, "total_episodes": 3}))
    with pytest.raises(DatasetError, match=r"episodes: expected 4 \(manifest.json\), got 3"):
        open_dataset(root)


def test_what_is_no_dataset_or_of_another_version_says_so(made, tmp_path):
    with pytest.raises(DatasetError, match=r"meta/info\.json"):
        open_dataset(tmp_path)
    root = shutil.copytree(made, tmp_path / "old")
    info = json.loads((root / "meta" / "info.json").read_text())
    for version, text in (("v2.1", r"recap ingest --lerobot"), ("v1.6", r"expected v3\.0")):
        (root / "meta" / "info.json").write_text(json.dumps({**info, "codebase_version": version}))
        with pytest.raises(DatasetError, match=text):
            open_dataset(root)


def test_row_groups_of_any_size_give_the_same_images(made, tmp_path):
    expected = [episode.images()["front"] for episode in open_dataset(made).episodes]
    for rows in (3, 1000):
        root = shutil.copytree(made, tmp_path / str(rows))
        for path in (root / "data").glob("chunk-*/file-*.parquet"):
            pq.write_table(pq.read_table(path), path, row_group_size=rows)
        for episode, frames in zip(open_dataset(root).episodes, expected, strict=True):
            np.testing.assert_array_equal(episode.images()["front"], frames)


def test_video_frames_come_back_close(made, tmp_path):
    source = open_dataset(made)
    spec, size = source.spec, (64, 64)
    slope = np.add.outer(np.arange(size[0]), np.arange(size[1])).astype(np.uint8)
    smooth = np.repeat(slope[None, ..., None], 3, axis=-1)
    spec = replace(spec, cameras=(Camera("front", *size),))
    (tmp_path / "video").mkdir()
    with VideoDatasetWriter(tmp_path / "video", spec) as writer:
        for shift in (0, 60):
            frames = np.concatenate([smooth + np.uint8(shift)] * 5)
            nothing = np.zeros((5, 2), np.float32)
            writer.add(EpisodeData("open it", nothing, nothing, {"front": frames}, np.zeros(5, bool), False, True,
                                   np.zeros(5)))  # fmt: skip
    first, second = (episode.images()["front"] for episode in open_dataset(tmp_path / "video").episodes)
    assert first.shape == (5, 64, 64, 3) and first.dtype == np.uint8
    assert np.abs(first.astype(int) - smooth).mean() < 6
    assert np.abs(second.astype(int) - smooth - 60).mean() < 6


def test_version_2_1_is_converted_into_a_copy(made, tmp_path):
    old = write_v21(open_dataset(made), tmp_path / "old")
    before = content_hash(old)
    convert_v21(old, tmp_path / "new")
    assert content_hash(old) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    for expected, got in zip(open_dataset(made).episodes, open_dataset(tmp_path / "new").episodes, strict=True):
        assert got.task == expected.task and got.success == expected.success
        np.testing.assert_array_equal(got.action, expected.action)
        np.testing.assert_array_equal(got.images()["top"], expected.images()["top"])
