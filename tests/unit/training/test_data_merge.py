"""Merging keeps every number of every source, says where it came from, and refuses what does not fit together."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edited_datasets import SPEC, column, drop, set_column, to_video, write_dataset
from recap_client.spec import ActionDim, Camera, StateDim
from recap_model import cli
from recap_model.manifest import content_hash, verify
from training import data_merge_writer
from training.data_merge import PROVENANCE, merge, split
from training.data_merge_plan import MergeError, plan_merge
from training.dataset import open_dataset


def same(one, two):
    """Two episodes are bit-equal in all but their index."""
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if field.name == "extra":
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_array_equal(a[name], b[name], strict=True)
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), field.name
        elif field.name not in ("index", "decode"):
            assert a == b, field.name
    mine, theirs = one.images(), two.images()
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name])


def dress(root, kinds, seed):
    """Add RECAP columns that the project's own writer does not write."""
    random, frames = np.random.default_rng(seed), len(column(root, "index"))
    made = {
        "reasoning": [f"step {n}" for n in range(frames)],
        "adv_ind": random.integers(-1, 2, frames).tolist(),
        "value_label": random.normal(size=frames).astype(np.float32).tolist(),
        "is_terminal": (random.random(frames) < 0.5).tolist(),
        "action_is_pad": [False] * frames,
    }
    for kind in kinds:
        set_column(root, kind, made[kind])
    episodes = len(column(root, "length", "meta/episodes"))
    set_column(root, "operator", [f"o{seed}"] * episodes, "meta/episodes")


EXTRAS = ("reasoning", "adv_ind", "value_label", "is_terminal", "action_is_pad")


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=2, max_size=3),
    st.sets(st.sampled_from(EXTRAS)),
    st.booleans(),
)
def test_merged_and_split_again_every_episode_is_bit_equal(tmp_path_factory, lengths, kinds, small_files):
    root = tmp_path_factory.mktemp("merge")
    folders = [write_dataset(root / f"d{n}", each, seed=n) for n, each in enumerate(lengths)]
    for number, folder in enumerate(folders):
        dress(folder, kinds, number)
    before = [content_hash(folder) for folder in folders]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_merge_writer, "_FILE_MB", 1e-6 if small_files else 100)
        merge(plan_merge(folders), root / "all")
    assert [content_hash(folder) for folder in folders] == before
    merged, parts = open_dataset(root / "all"), split(open_dataset(root / "all"))
    assert list(parts) == [str(folder) for folder in folders]
    for folder in folders:
        source = open_dataset(folder)
        assert len(parts[str(folder)]) == len(source.episodes)
        for one, two in zip(source.episodes, parts[str(folder)], strict=True):
            same(one, two)
    assert [episode.index for episode in merged.episodes] == list(range(sum(map(len, lengths))))
    verify(root / "all", "dataset")


@pytest.fixture
def pair(tmp_path):
    a = write_dataset(tmp_path / "a", (3, 1), seed=1)
    return [a, write_dataset(tmp_path / "b", (2, 4), tasks=("shut", "open it"), seed=2)]


def refused(folders, **options):
    with pytest.raises(MergeError) as error:
        plan_merge(folders, **options)
    return str(error.value)


def test_provenance_and_manifest_say_what_came_from_where(pair, tmp_path):
    first = merge(plan_merge(pair), tmp_path / "ab")
    third = write_dataset(tmp_path / "c", (5,), seed=3)
    merge(plan_merge([tmp_path / "ab", third]), tmp_path / "abc")
    rows = json.loads((tmp_path / "abc" / PROVENANCE).read_text())
    hashes = [open_dataset(folder).hash for folder in pair]
    assert [(row["source"], row["episodes"], row["frames"]) for row in rows] == [
        (str(tmp_path / "ab"), [0, 4], [0, 10]), (str(third), [4, 5], [10, 15])]  # fmt: skip
    assert [row["hash"] for row in rows] == [first.hash, open_dataset(third).hash]
    assert [row["hash"] for row in rows[0]["sources"]] == hashes
    assert first.parents == {"source 0": hashes[0], "source 1": hashes[1]}
    assert first.metrics["tasks"]["open it"] == {"episodes": 2, "successes": 2}
    merged = open_dataset(tmp_path / "ab")
    assert merged.spec.tasks == ("close it", "open it", "shut")
    assert merged.spec.action == SPEC.action


def test_features_and_statistics_of_an_episode_stay_what_the_writer_made_them(tmp_path):
    both, merged = write_dataset(tmp_path / "both", (3, 4, 2, 5)), tmp_path / "merged"
    merge(plan_merge([both, write_dataset(tmp_path / "c", (2,), seed=9)]), merged)
    stats, wanted = (json.loads((root / "meta" / "stats.json").read_text()) for root in (merged, both))
    assert stats.keys() == wanted.keys()
    for name in wanted:
        assert column(merged, f"stats/{name}/mean", "meta/episodes")[:4] == column(both, f"stats/{name}/mean",
                                                                                   "meta/episodes")  # fmt: skip
    info, expected = (json.loads((root / "meta" / "info.json").read_text()) for root in (merged, both))
    assert info["features"] == expected["features"]
    assert (info["total_episodes"], info["total_frames"]) == (5, 16)
    assert column(merged, "index") == list(range(16))


def test_every_difference_is_told_at_once(pair, tmp_path):
    other = replace(
        SPEC,
        cameras=(Camera("front", 32, 48), Camera("side", 32, 32)),
        state=(StateDim("x", "rad"), StateDim("grip", "1")),
        action=(ActionDim("dx", "1", -2.0, 1.0), ActionDim("hand", "1", -1.0, 1.0)),
        control_hz=10.0,
    )
    odd = write_dataset(tmp_path / "odd", (2,), spec=other)
    said = refused([pair[0], odd, pair[0]])
    where = f"(as in {pair[0]})"
    assert said.splitlines() == [
        "the datasets differ in 8 points:",
        f"  {pair[0]}: the same data as {pair[0]}: its episodes would count twice",
        f"  {odd}: fps: expected 20, got 10 {where}",
        f"  {odd}: camera 'front': expected 32x32, got 32x48 {where}",
        f"  {odd}: camera 'top': expected 32x32, got none {where}",
        f"  {odd}: camera 'side': expected none, got 32x32 {where}",
        f"  {odd}: state[x]: expected the unit m, got rad {where}",
        f"  {odd}: action: expected the dimensions ['dx', 'grip'], got ['dx', 'hand'] {where}",
        f"  {odd}: action[dx]: expected the limits -1 to 1, got -2 to 1 {where}",
    ]


def test_units_that_only_one_side_states_are_refused_with_the_way_out(pair):
    (pair[1] / "meta" / "recap_spec.json").unlink()
    assert refused(pair) == (
        f"the datasets differ in 1 points:\n  {pair[1]}: state[x]: expected the unit m, got 1; only one of the two has "
        f"meta/recap_spec.json: copy it over (as in {pair[0]})"
    )


def test_limits_nobody_stated_widen_to_all_recorded_actions(pair, tmp_path):
    for folder in pair:
        (folder / "meta" / "recap_spec.json").unlink()
    merge(plan_merge(pair), tmp_path / "ab")
    merged = open_dataset(tmp_path / "ab")
    actions = np.concatenate([episode.action for episode in merged.episodes])
    np.testing.assert_array_equal([dim.low for dim in merged.spec.action], actions.min(0))
    assert not (tmp_path / "ab" / "meta" / "recap_spec.json").exists()


def test_a_column_of_another_type_is_refused(pair):
    frames = len(column(pair[0], "index"))
    set_column(pair[0], "adv_ind", [1] * frames)
    set_column(pair[1], "adv_ind", ["positive"] * len(column(pair[1], "index")))
    assert f"{pair[1]}: column 'adv_ind': expected int64, got string" in refused(pair)


def test_a_column_that_only_one_has_is_refused_with_what_would_fill_it(pair):
    set_column(pair[0], "value_label", [0.5] * 4)
    set_column(pair[0], "operator", ["ann", "bob"], "meta/episodes")
    there = f"expected in every dataset, got none in {pair[1]} (--fill-missing fills in:"
    assert refused(pair).splitlines()[1:] == [
        f"  column 'value_label': {there} nan)",
        f"  column 'meta/episodes operator': {there} null)",
    ]


def test_filled_columns_read_as_the_dataset_did_without_them(pair, tmp_path, capsys):
    """A demonstration stays one, a known outcome stays known, and an unknown one stays unknown."""
    drop(pair[1], "intervention", "demonstration", "success", "next.reward", "next.done")
    set_column(pair[1], "is_success", [1.0, 1.0, float("nan"), float("nan"), float("nan"), float("nan")])
    set_column(pair[0], "reasoning", list("wxyz"))
    command = ["data", "merge", *map(str, pair), "--out", str(tmp_path / "ab")]
    assert cli.main(command) == 2
    capsys.readouterr()
    assert cli.main([*command, "--fill-missing"]) == 0
    assert f"filled in {pair[1]}: intervention: 0, nobody took over\n" in capsys.readouterr().out
    merged = open_dataset(tmp_path / "ab")
    for folder in pair:
        for one, two in zip(open_dataset(folder).episodes, split(merged)[str(folder)], strict=True):
            assert (one.demonstration, one.success) == (two.demonstration, two.success)
            np.testing.assert_array_equal(one.intervention, two.intervention)
    last = merged.episodes[-1]
    assert last.success is None and merged.episodes[2].success is True
    assert last.extra["next.done"].tolist() == [False, False, False, True]
    assert last.extra["reasoning"].tolist() == [""] * 4 and np.isnan(last.reward).all()
    assert merged.episodes[0].extra["reasoning"].tolist() == ["w", "x", "y"]
    filled = json.loads((tmp_path / "ab" / PROVENANCE).read_text())[1]["filled"]
    assert filled["next.done"] == "true on the last frame"


def test_masks_and_padding_that_are_filled_in_hide_nothing(pair, tmp_path):
    set_column(pair[0], "loss_mask_left", [0, 1, 1, 0])
    set_column(pair[0], "action_is_pad", [[False, True]] * 4)
    info = json.loads((pair[0] / "meta" / "info.json").read_text())
    info["features"]["action_is_pad"] = {"dtype": "bool", "shape": [2], "names": None}
    (pair[0] / "meta" / "info.json").write_text(json.dumps(info))
    merge(plan_merge(pair, fill_missing=True), tmp_path / "ab")
    extra = [episode.extra for episode in open_dataset(tmp_path / "ab").episodes]
    assert [mask for e in extra for mask in e["loss_mask_left"].tolist()] == [0, 1, 1, 0] + [1] * 6
    assert column(tmp_path / "ab", "action_is_pad") == [[False, True]] * 4 + [[False, False]] * 6


def test_demonstrations_stay_ones_when_the_intervention_column_is_filled_in(pair, tmp_path):
    drop(pair[0], "demonstration")
    drop(pair[1], "demonstration", "intervention")
    merge(plan_merge(pair, fill_missing=True), tmp_path / "ab")
    assert [e.demonstration for e in open_dataset(tmp_path / "ab").episodes] == [False, False, True, True]


def test_an_existing_folder_and_a_single_dataset_are_refused(pair):
    with pytest.raises(MergeError, match=r"b: expected a folder that does not exist yet for the merged"):
        merge(plan_merge(pair), pair[1])
    assert refused(pair[:1]) == "expected at least two datasets to merge, got 1"


def test_a_failed_merge_leaves_nothing(pair, tmp_path):
    cells = column(pair[1], "observation.images.top")
    cells[3]["bytes"] = None
    set_column(pair[1], "observation.images.top", cells)
    plan = plan_merge(pair)
    with pytest.raises(ValueError, match=r"b: episode 1: observation.images.top: expected images in the data files"):
        merge(plan, tmp_path / "ab")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_videos_are_copied_and_a_missing_one_is_named(pair, tmp_path):
    for folder in pair:
        to_video(folder)
    merge(plan_merge(pair), tmp_path / "ab")
    name = "observation.images.top"
    for number, folder in enumerate(pair):
        (source,) = (folder / "videos" / name).rglob("*.mp4")
        assert (tmp_path / "ab/videos" / name / f"chunk-000/file-00{number}.mp4").read_bytes() == source.read_bytes()
    assert column(tmp_path / "ab", f"videos/{name}/file_index", "meta/episodes") == [0, 0, 1, 1]
    starts = [column(folder, f"videos/{name}/from_timestamp", "meta/episodes") for folder in pair]
    assert column(tmp_path / "ab", f"videos/{name}/from_timestamp", "meta/episodes") == starts[0] + starts[1]
    source.unlink()
    with pytest.raises(ValueError, match=r"000.mp4: expected the video of observation.images.top, got no such file"):
        merge(plan_merge(pair), tmp_path / "again")


def test_images_and_videos_mix_only_when_told_how(pair):
    to_video(pair[1])
    said = refused(pair)
    assert "observation.images.top: expected image, got video; --cameras image (lossless from here on) or" in said
    assert plan_merge(pair, cameras="image").cameras == dict.fromkeys(
        ("observation.images.front", "observation.images.top"), "image"
    )


def test_videos_become_images_and_images_videos(pair, tmp_path):
    """LeRobot opens both, and the pictures are the ones of the source (bit-equal where nothing is encoded lossily)."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    to_video(pair[1])
    for kind in ("image", "video"):
        merge(plan_merge(pair, cameras=kind), tmp_path / kind)
        merged = open_dataset(tmp_path / kind)
        for folder in pair:
            lossless = kind == "image" or folder is pair[1]
            for one, two in zip(open_dataset(folder).episodes, split(merged)[str(folder)], strict=True):
                if lossless:
                    same(one, two)
                else:
                    assert two.images()["top"].shape == one.images()["top"].shape
        theirs = LeRobotDataset("local/merged", root=tmp_path / kind)
        assert (theirs.num_episodes, theirs.num_frames) == (4, 10)
        assert theirs[9]["task"] == merged.episodes[3].task
        assert theirs[9]["observation.images.top"].shape == (3, 32, 32)
        np.testing.assert_array_equal(theirs[9]["action"].numpy(), merged.episodes[3].action[3])
    assert not list((tmp_path / "video").glob("encoded*"))
