"""Damaged, mixed and interrupted data: every file that is not used is named, and nothing half-made looks finished."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from recap_client.rollout import read_rollout
from recap_client.spec import Camera
from recap_model import cli
from recap_model.manifest import read_manifest
from sample_rollouts import SPEC, record, record_mixed, truncate
from training.dataset import open_dataset
from training.ingest import IngestError, ingest, survey


@pytest.fixture
def rollouts(tmp_path):
    return record_mixed(tmp_path / "rollouts", 3)


def test_a_truncated_recording_is_named_and_left_out(rollouts, tmp_path, capsys):
    path = record(rollouts, 7, length=400)
    truncate(path)
    assert cli.main(["ingest", "--rollouts", str(rollouts), "--out", str(tmp_path / "d")]) == 0
    text = capsys.readouterr().out
    assert f"left out {path}: it was not closed" in text and "3 episodes" in text
    assert path.name in str(read_manifest(tmp_path / "d").parameters["left_out"])
    assert path.exists()


def test_the_readable_part_can_be_kept_as_a_failure(rollouts, tmp_path):
    path = record(rollouts, 7, length=400)
    truncate(path)
    found = survey([rollouts], keep_incomplete=True)
    assert not found.left and 0 < found.sources[-1].steps < 400
    ingest(found, tmp_path / "d")
    last = open_dataset(tmp_path / "d").episodes[-1]
    recorded = read_rollout(path)
    assert last.success is False and len(last) == recorded.steps
    np.testing.assert_array_equal(last.images()["top"], recorded.images["top"])


def test_an_unknown_outcome_is_left_out_with_the_flag_that_keeps_it(rollouts):
    record(rollouts, 7, close=False)
    (left,) = survey([rollouts]).left
    assert "outcome is not known" in left.reason and "--keep-incomplete" in left.reason


def test_a_file_that_is_no_recording_stops_the_ingestion_and_is_named(rollouts, tmp_path, capsys):
    (rollouts / "notes.mcap").write_bytes(b"shopping list")
    command = ["ingest", "--rollouts", str(rollouts), "--out", str(tmp_path / "d")]
    assert cli.main(command) == 2
    assert "notes.mcap: expected a rollout log" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
    assert cli.main([*command, "--skip-invalid"]) == 0
    assert "notes.mcap" in capsys.readouterr().out


def test_nan_in_the_state_names_file_step_and_dimension(rollouts):
    record(rollouts, 7, nan_at=4)
    with pytest.raises(IngestError, match=r"episode-007.mcap: frame 4: state\[grip\]: expected a finite .* got nan"):
        survey([rollouts])
    assert len(survey([rollouts], skip_invalid=True).sources) == 3


@pytest.mark.parametrize("change", [{"cameras": (Camera("front", 24, 16), SPEC.cameras[1])}, {"control_hz": 10.0},
                                    {"state": SPEC.state[:1]}])  # fmt: skip
def test_recordings_of_another_robot_set_up_are_refused(rollouts, change):
    record(rollouts, 7, spec=replace(SPEC, **change))
    with pytest.raises(IngestError, match=rf"episode-007.mcap .*spec.{next(iter(change))} differs: expected .*, got "):
        survey([rollouts])


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_or_missing_folder_is_named(tmp_path, capsys, exists):
    if exists:
        (tmp_path / "nothing").mkdir()
    assert cli.main(["ingest", "--rollouts", str(tmp_path / "nothing"), "--out", str(tmp_path / "d")]) == 2
    error = capsys.readouterr().err
    assert "nothing: expected" in error and not (tmp_path / "d").exists()


def test_only_unusable_recordings_are_an_error_with_the_reasons(tmp_path):
    truncate(record(tmp_path, 1, length=40), 0.5)
    with pytest.raises(IngestError, match=r"at least one usable recording .*episode-001.mcap: it was not closed"):
        survey([tmp_path])


def test_killed_in_the_middle_nothing_looks_finished_and_a_rerun_works(tmp_path):
    rollouts = record_mixed(tmp_path / "rollouts", 4)
    for number in range(10, 40):
        record(rollouts, number, length=30)
    out = tmp_path / "data" / "d"
    command = [sys.executable, "-m", "recap_model.cli", "ingest", "--rollouts", str(rollouts), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("data/.d.*/**/file-*.parquet")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists() and not list(tmp_path.rglob("manifest.json"))
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert len(open_dataset(out).episodes) == 34


def test_an_error_while_writing_keeps_the_old_dataset(rollouts, tmp_path):
    ingest(survey([rollouts]), tmp_path / "d")
    before = read_manifest(tmp_path / "d")
    found = survey([rollouts])
    truncate(found.sources[1].path, 0.1)
    with pytest.raises(ValueError, match=r"episode-001.mcap"):
        ingest(found, tmp_path / "d")
    assert read_manifest(tmp_path / "d") == before and len(open_dataset(tmp_path / "d").episodes) == 3
    assert not list(tmp_path.glob(".d.*"))
