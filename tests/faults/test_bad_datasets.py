"""Data that nobody wants and everybody has: every step says what is wrong, or does what the documentation says."""

import json
from dataclasses import replace

import numpy as np
import pytest

from edited_datasets import SPEC, column, drop, set_column, to_video, write_dataset
from recap_model import cli
from recap_model.manifest import read_manifest
from training.dataset import open_dataset
from training.labels import load_labels, load_returns, read_values


def run(*argv):
    return cli.main([str(word) for word in argv])


def refused(capsys, *argv):
    """The message of a command that must refuse, without its name and the hint at --debug."""
    capsys.readouterr()
    assert run(*argv) == 2
    return capsys.readouterr().err.split("\n  (add --debug")[0].partition(": ")[2]


def labelled(root, folder, *label):
    """returns, critic, values and advantage of a dataset, by the commands at debug size."""
    data = ("--dataset", root, "--returns", folder / "returns")
    assert run("returns", "--dataset", root, "--out", folder / "returns") == 0
    critic = ("--preset", "debug", "--steps", "2", "--folds", "2", "--values-out", folder / "values")
    assert run("train", "critic", *data, *critic, "--out", folder / "critic") == 0
    assert run("label", *data, "--values", folder / "values", "--out", folder / "advantage", *label) == 0


def train(root, out, *more):
    return ("train", "policy", "--dataset", root, "--preset", "debug", "--steps", "2", "--out", out, *more)


def test_datasets_of_different_rates_are_not_merged(tmp_path, capsys):
    a = write_dataset(tmp_path / "a")
    b = write_dataset(tmp_path / "b", spec=replace(SPEC, control_hz=50.0), seed=1)
    said = refused(capsys, "data", "merge", a, b, "--out", tmp_path / "ab")
    assert said == f"the datasets differ in 1 points:\n  {b}: fps: expected 20, got 50 (as in {a})"
    assert not (tmp_path / "ab").exists()


def test_a_dataset_without_any_camera(tmp_path, capsys):
    root = write_dataset(tmp_path / "d")
    cameras = [f"observation.images.{camera.name}" for camera in SPEC.cameras]
    drop(root, *cameras)
    info = json.loads((root / "meta" / "info.json").read_text())
    for name in cameras:
        del info["features"][name]
    (root / "meta" / "info.json").write_text(json.dumps(info))
    said = refused(capsys, *train(root, tmp_path / "x", "--mode", "imitation"))
    assert said == (
        f"{root}: meta/recap_spec.json: expected frames of camera 'front', got cameras []; see `recap data check`"
    )
    (root / "meta" / "recap_spec.json").unlink()
    said = refused(capsys, "returns", "--dataset", root, "--out", tmp_path / "x")
    assert said == (
        f"{root}: expected at least one camera observation.images.<name>, got features {sorted(info['features'])}"
    )


def test_a_camera_that_the_files_do_not_hold(tmp_path, capsys):
    root = write_dataset(tmp_path / "d")
    drop(root, "observation.images.top")
    said = refused(capsys, *train(root, tmp_path / "x", "--mode", "imitation"))
    assert said == f"{root}: data: expected images of camera 'top', got cameras ['front']; see `recap data check`"


def test_a_video_that_is_not_there(tmp_path, capsys):
    root = to_video(write_dataset(tmp_path / "d"))
    path = root / "videos/observation.images.front/chunk-000/file-000.mp4"
    path.unlink()
    said = refused(capsys, *train(root, tmp_path / "x", "--mode", "imitation"))
    assert said == f"{path}: expected the video of observation.images.front, got no such file; see `recap data check`"


def test_cameras_of_another_size_than_their_frames(tmp_path, capsys):
    root = write_dataset(tmp_path / "d")
    spec = replace(SPEC, cameras=(SPEC.cameras[0], replace(SPEC.cameras[1], height=64, width=64)))
    (root / "meta" / "recap_spec.json").write_text(json.dumps(spec.to_json()))
    said = refused(capsys, *train(root, tmp_path / "x", "--mode", "imitation", "--preset", "debug"))
    assert said.startswith("cameras: expected square frames of one size")


def test_episodes_of_one_frame_go_through_every_step(tmp_path):
    """A success of one frame has return 0, a failure -1; advantages compare them with the critic and nothing else."""
    root = write_dataset(tmp_path / "d", (1, 1, 1, 1, 1, 1))
    labelled(root, tmp_path, "--n", "1")
    data = open_dataset(root)
    assert load_returns(tmp_path / "returns", data).values.tolist() == [0.0, 0.0, -1.0, 0.0, 0.0, -1.0]
    labels, values = load_labels(tmp_path / "advantage", data), read_values(tmp_path / "values", data)
    np.testing.assert_allclose(labels.advantage, labels.returns - values.values, atol=1e-12)
    assert run(*train(root, tmp_path / "policy", "--mode", "recap", "--labels", tmp_path / "advantage")) == 0
    assert read_manifest(tmp_path / "policy").metrics["frames"] == 6


def test_a_task_without_a_success_is_warned_about(tmp_path, capsys):
    root = write_dataset(tmp_path / "d", (4, 5, 3, 7), successes=(True, False, True, False))
    assert run("returns", "--dataset", root, "--out", tmp_path / "returns") == 0
    warning = (
        "task 'close it': none of 2 episodes succeeds: all its returns are those of failures, T_max is its longest "
        "episode"
    )
    assert f"warning {warning}\n" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "returns")
    assert manifest.metrics["warnings"] == [warning]
    assert manifest.parameters["t_max"] == {"close it": 7.0, "open it": 4.0}
    values = load_returns(tmp_path / "returns", open_dataset(root)).values
    assert set(values[4:9]) == {-1.0} and values[3] == 0.0


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Nothing but failures, with labels by outcome."""
    folder = tmp_path_factory.mktemp("failures")
    root = write_dataset(folder / "d", successes=(False,) * 4)
    labelled(root, folder, "--mode", "outcome")
    return folder


def test_nothing_but_failures_is_labelled_negative_and_warned_about(failures):
    report, labels = (read_manifest(failures / name).metrics for name in ("critic", "advantage"))
    assert (report["successes"], report["spearman"], report["auc_50"]) == (0, None, None)
    assert len(read_manifest(failures / "returns").metrics["warnings"]) == 2
    frames = load_labels(failures / "advantage", open_dataset(failures / "d"))
    assert not frames.indicator.any() and set(frames.returns) == {-1.0}
    assert (
        "no frame is positive: the policy is served with `positive`, which it would never have seen"
        in (labels["warnings"])
    )


def test_nothing_but_failures_leaves_nothing_to_imitate(failures, tmp_path, capsys):
    said = refused(capsys, *train(failures / "d", tmp_path / "x", "--mode", "filtered", "--labels",
                                  failures / "advantage"))  # fmt: skip
    assert said == (
        "--mode filtered: expected positive frames to train on, got none among 22; read audit.html of the labels, or "
        "train with --mode recap"
    )
    said = refused(capsys, "returns", "--dataset", failures / "d", "--out", tmp_path / "x", "--all-successful")
    assert said == (
        f"{failures / 'd'}: --all-successful contradicts the data: 4 episodes are recorded as failures, the first is 0"
    )


def test_no_outcome_at_all(tmp_path, capsys):
    root = write_dataset(tmp_path / "d")
    drop(root, "success")
    said = refused(capsys, "returns", "--dataset", root, "--out", tmp_path / "x")
    assert said == (
        f"{root}: 4 of 4 episodes have no outcome (the first is episode 0): expected a column `success` (0/1, on "
        "frames or in meta/episodes); if these are all demonstrations that succeeded, say so with --all-successful"
    )
    assert run("returns", "--dataset", root, "--out", tmp_path / "returns", "--all-successful") == 0


def test_one_episode_is_too_few_to_hold_any_out(tmp_path, capsys):
    root = write_dataset(tmp_path / "d", (6,))
    assert run("returns", "--dataset", root, "--out", tmp_path / "returns") == 0
    critic = ("train", "critic", "--dataset", root, "--returns", tmp_path / "returns", "--preset", "debug")
    said = refused(capsys, *critic, "--folds", "2", "--out", tmp_path / "c", "--values-out", tmp_path / "v")
    assert said == (
        "--folds 2: expected at least 2 episodes, one for every fold to hold out, got 1; record more, or train with "
        "--folds 1"
    )


def test_infinity_in_the_state_stops_training_and_is_placed(tmp_path, capsys):
    root = write_dataset(tmp_path / "d")
    values = column(root, "observation.state")
    values[4][0] = float("inf")
    set_column(root, "observation.state", values)
    said = refused(capsys, *train(root, tmp_path / "x", "--mode", "imitation"))
    assert said == (
        "episode 1, frame 0: observation.state[x]: expected a finite number, got inf (1 such entries); remove or "
        "repair the episode"
    )
