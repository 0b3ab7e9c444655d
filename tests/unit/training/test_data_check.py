"""`recap data check` finds every fault put into a sound dataset, and survives files that nothing else can read."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edited_datasets import column, drop, edit, set_column, to_video, write_dataset
from recap_model import cli
from recap_model.manifest import content_hash, write_manifest
from training.columns import DatasetError
from training.data_check import check_dataset
from training.dataset import open_dataset


@pytest.fixture
def root(tmp_path):
    return write_dataset(tmp_path / "d")


def found(root, check=None):
    """(severity, episode, column, text) of all problems, or of one check."""
    problems = check_dataset(root).problems
    return [(p.severity, p.episode, p.column, p.text) for p in problems if check in (None, p.check)]


def test_a_sound_dataset_has_no_problem_and_is_not_modified(root):
    before = content_hash(root)
    report = check_dataset(root)
    assert (report.problems, report.episodes, report.frames) == ((), 4, 22)
    assert content_hash(root) == before


def spoil(root, name, row, value):
    values = column(root, name)
    if isinstance(values[row], list):
        values[row][1] = value
    else:
        values[row] = value
    set_column(root, name, values)


def test_nan_and_infinity_by_column_and_dimension(root):
    for row, value in ((2, np.nan), (5, np.inf), (6, np.nan)):
        spoil(root, "observation.state", row, value)
    spoil(root, "next.reward", 21, np.nan)
    assert found(root, "finite") == [
        ("error", None, "observation.state[grip]", "3 frames are not finite, the first in episode 0, frame 2: nan"),
        ("warning", None, "next.reward", "1 frames are not finite, the first in episode 3, frame 6: nan"),
    ]


def test_jumps_in_time_are_errors_and_small_drift_a_warning(root):
    stamps = column(root, "timestamp")
    stamps[6:9] = [value + 0.5 for value in stamps[6:9]]
    stamps[12] += 0.002
    set_column(root, "timestamp", stamps)
    assert found(root, "time") == [
        ("error", 1, "timestamp", "1 steps are not 0.05 s (20 fps), the worst: 0.55 s, frame 2"),
        ("warning", 2, "timestamp", "2 steps are not 0.05 s (20 fps), the worst: 0.052 s, frame 3"),
    ]


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.sampled_from([10, 15, 24, 30, 50, 60]), st.integers(1, 100_000))
def test_long_regular_recordings_have_no_jump(tmp_path, fps, first):
    """float32 timestamps lose digits over hours; that is no fault of the recording."""
    from training.data_check_files import Loose
    from training.data_check_signals import time_problems

    stamps = (np.arange(first, first + 500) / fps).astype(np.float32)
    loose = Loose(tmp_path, {"fps": fps}, columns={"timestamp": stamps}, runs=[(0, slice(0, 500))])
    assert list(time_problems(loose)) == []
    stamps[250:] += np.float32(1.5 / fps)
    assert [problem.severity for problem in time_problems(loose)] == ["error"]


def test_frozen_joints(root):
    state = np.array(column(root, "observation.state"))
    state[4:9, 0] = 0.25
    set_column(root, "observation.state", state.tolist())
    assert found(root) == [
        ("warning", 1, "observation.state[x]", "constant at 0.25 for all 5 frames while others move")
    ]
    state[:, 0] = 0.25
    state[9:15, 1] = 1.0
    set_column(root, "observation.state", state.tolist())
    assert found(root, "frozen") == [
        ("warning", None, "observation.state[x]", "constant at 0.25 in all frames of all episodes"),
        ("warning", 2, "observation.state", "nothing of the state moves"),
    ]


def test_contradictory_and_odd_outcomes_of_all_episodes(root):
    set_column(root, "next.success", [1] * 9 + [0, 1, 0, 0, 0, 1] + [1] * 7)
    set_column(root, "is_success", [True, False, None, True], "meta/episodes")
    contradiction = (
        "outcome columns contradict each other: 'next.success' says success, 'meta/episodes is_success' says failure; "
        "correct or drop one"
    )
    odd = "column 'next.success': expected one outcome (0 or 1 on every frame, or 0 that turns to 1), got 0 1 0 0 0 1"
    assert found(root, "outcome") == [("error", 1, None, contradiction), ("error", 2, "next.success", odd)]


def test_missing_outcomes_and_flags(root):
    drop(root, "success")
    assert found(root) == [
        ("warning", None, None, "no episode has an outcome: expected one of the columns success, next.success, "
                                "is_success, episode_success; `recap returns` needs --all-successful")]  # fmt: skip
    set_column(root, "value_label", [-0.1] * 21 + [-1.0])  # of openpi forks: `recap returns` takes it as the outcome
    assert found(root) == []
    drop(root, "value_label")
    set_column(root, "success", [True, False, None, True], "meta/episodes")
    spoil(root, "intervention", 3, 2)
    spoil(root, "demonstration", 3, 0)
    assert found(root) == [
        ("error", None, "intervention", "column 'intervention': expected 0 or 1, got 2.0 in row 3"),
        ("warning", None, None, "1 of 4 episodes have no outcome: 2; `recap returns` refuses"),
        ("warning", 0, "demonstration", "expected 0 or 1 on all frames, got 1 on 3 of 4"),
    ]


def test_actions_outside_the_limits_only_where_they_are_stated(root):
    spoil(root, "action", 4, 1.5)
    ((severity, episode, where, text),) = found(root)
    assert (severity, episode, where) == ("warning", None, "action[grip]")
    assert text.startswith("1 frames outside -1 to 1 1 (meta/recap_spec.json): ") and text.endswith(
        " to 1.5, the first in episode 1, frame 0"
    )
    (root / "meta" / "recap_spec.json").unlink()
    assert found(root) == []


def test_one_frame_episodes_duplicates_and_tasks_without_success(tmp_path):
    root = write_dataset(tmp_path / "d", (3, 1, 3, 2), successes=(True, False, True, False))
    state = column(root, "observation.state")
    set_column(root, "observation.state", state[:4] + state[:3] + state[7:])
    assert found(root) == [
        ("warning", None, None, "task 'close it': none of 2 episodes succeeds: all its returns are -1"),
        ("warning", 1, None, "one frame: there is no motion in it to learn from"),
        ("warning", 2, "observation.state", "the same states as episode 0"),
    ]


def test_missing_broken_and_odd_images(root):
    front = column(root, "observation.images.front")
    front[1]["bytes"] = front[1]["bytes"][:60]
    front[2]["bytes"] = None
    front[5]["bytes"] = front[5]["bytes"][:100] + b"????" + front[5]["bytes"][104:]
    set_column(root, "observation.images.front", front)
    first, second = found(root, "images")
    assert first[:3] == ("error", 0, "observation.images.front")
    assert first[3].startswith("2 frames without a usable image, the first: frame 1: expected an image, got 60 bytes")
    assert second[1] == 1 and "frame 1: expected an image" in second[3]
    drop(root, "observation.images.top")
    assert any("expected a column of this camera, got none" in text for *_, text in found(root, "images"))


def test_missing_and_truncated_videos(root):
    to_video(root)
    assert found(root) == []
    path = root / "videos/observation.images.top/chunk-000/file-000.mp4"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * 0.8)])
    problems = found(root)
    assert problems and {problem[:3] for problem in problems} <= {
        ("error", n, "observation.images.top") for n in (2, 3)
    }
    assert problems[-1][3].startswith(f"{path}: expected 7 frames from 0.75 s at 20 fps, got ")
    path.write_bytes(whole[:200])
    ((*_, text),) = found(root)
    assert text.startswith(f"{path}: expected the video of episodes 0, 1, 2, 3, got a file that cannot be read (")
    path.unlink()
    assert found(root) == [("error", None, "observation.images.top",
                            f"{path}: expected the video of episodes 0, 1, 2, 3, got no such file")]  # fmt: skip


def test_layout_faults_are_all_listed(root):
    drop(root, "action")
    spoil(root, "task_index", 0, 7)
    edit(root, lambda table: table.slice(0, 20))
    info = json.loads((root / "meta" / "info.json").read_text())
    del info["features"]["observation.images.top"]
    (root / "meta" / "info.json").write_text(json.dumps(info))
    there = sorted({*info["features"], "observation.images.top"} - {"action", "observation.images.front"})
    camera = "expected camera 'top' of meta/recap_spec.json, got features of ['observation.images.front']"
    assert [(episode, where, text) for _, episode, where, text in found(root)] == [
        (None, "action", f"expected this column, got {there}"),
        (None, None, "frames: expected 22 (meta/info.json), got 20 in the data files"),
        (3, None, "expected 7 frames (meta/episodes), got 5"),
        (0, "task_index", "expected one of [0, 1] (meta/tasks.parquet), got [7]"),
        (None, "observation.images.top", camera),
        (None, None, "task 'open it': none of 1 episodes succeeds: all its returns are -1"),
    ]


def test_scattered_episodes_and_gaps(root):
    spoil(root, "episode_index", 10, 0)
    spoil(root, "frame_index", 5, 9)
    texts = {(episode, text) for _, episode, _, text in found(root, "layout")}
    pieces = "expected its frames in one piece, got 2 pieces"
    assert {(0, pieces), (2, pieces), (1, "expected 0, 1, 2 ..., got 9 in place 1 (1 such frames)")} <= texts


def test_a_dataset_changed_after_its_manifest(root):
    write_manifest(root, "dataset", metrics={"episodes": 4, "frames": 22})
    assert found(root) == []
    (root / "meta" / "note.txt").write_text("x")
    ((severity, *_, text),) = found(root)
    assert severity == "error" and "content hash: expected" in text and "changed after it was made" in text


FILES = ("meta/info.json", "meta/recap_spec.json", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet",
         "data/chunk-000/file-000.parquet", "meta/stats.json")  # fmt: skip


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FILES), st.one_of(st.none(), st.floats(0, 0.99), st.binary(max_size=40)))
def test_whatever_file_is_broken_it_reports_and_never_dies(tmp_path_factory, name, damage):
    """Law: no error reported means that the dataset opens, and an unreadable file is an error."""
    root = write_dataset(tmp_path_factory.mktemp("broken") / "d", (2, 1))
    path = root / name
    data = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage if isinstance(damage, bytes) else data[: int(len(data) * damage)])
    report = check_dataset(root)
    if report.errors:
        json.dumps(report.to_json())
    else:
        assert len(open_dataset(root).episodes) == report.episodes


ODD = ("episode_index", "frame_index", "task_index", "success", "intervention", "timestamp", "action")


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.sampled_from(ODD), st.integers(0, 4), st.sampled_from([None, -1, 2, 1000]))
def test_what_open_dataset_refuses_is_an_error(tmp_path_factory, name, row, value):
    root = write_dataset(tmp_path_factory.mktemp("odd") / "d", (2, 3))
    values = column(root, name)
    values[row] = [value, value] if name == "action" else value
    set_column(root, name, values)
    try:
        open_dataset(root)
        refused = False
    except (DatasetError, TypeError, ValueError):
        refused = True
    assert not refused or check_dataset(root).errors


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"codebase_version": "v3.0"}', '{"codebase_version": "v3.0", "features": 3}']
)
def test_a_hostile_info_file_is_a_problem_and_no_crash(root, content):
    (root / "meta" / "info.json").write_text(content)
    assert check_dataset(root).errors


def test_the_command_writes_json_and_its_exit_code_is_1_only_for_errors(root, tmp_path, capsys):
    out = tmp_path / "report.json"
    sound = write_dataset(tmp_path / "sound", (1, 4), seed=4)
    assert cli.main(["data", "check", str(sound), "--json", str(out)]) == 0
    spoil(root, "action", 3, np.nan)
    assert cli.main(["data", "check", str(sound), str(root), str(tmp_path / "none"), "--json", str(out)]) == 1
    first, second, third = json.loads(out.read_text())
    assert (first["errors"], first["warnings"], first["problems"][0]["check"]) == (0, 1, "short")
    text = "1 frames are not finite, the first in episode 0, frame 3: nan"
    assert second["problems"] == [
        {"severity": "error", "check": "finite", "text": text, "episode": None, "column": "action[grip]"}
    ]
    assert "expected a LeRobot dataset (a folder with meta/info.json), got none" in third["problems"][0]["text"]
    assert f"{root}: 4 episodes, 22 frames, 1 errors, 0 warnings" in capsys.readouterr().out
    assert cli.main(["data", "check"]) == 2


def test_one_column_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    """Two data files that disagree about a column's type: named, and NaN elsewhere is still found."""
    root = write_dataset(tmp_path / "d", (2, 2))
    spoil(root, "action", 3, np.nan)
    (path,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 2), path)
    odd = table.slice(2).set_column(table.column_names.index("success"), "success", [["yes", "no"]])
    pq.write_table(odd, path.with_name("file-001.parquet"))
    problems = found(root)
    assert problems[0][:3] == ("error", None, "success")
    nan = "1 frames are not finite, the first in episode 1, frame 1: nan"
    assert ("error", None, "action[grip]", nan) in problems
