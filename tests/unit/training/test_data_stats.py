"""`recap data stats` says what normalisation will use; `recap data convert` makes a v3.0 copy or says why not."""

import json
from dataclasses import replace

import numpy as np
import pytest

from edited_datasets import SPEC, column, set_column, write_dataset
from lerobot_v21 import write_v21
from recap_client.spec import ActionDim
from recap_model import cli
from recap_model.manifest import content_hash
from recap_model.normalize import NormStats
from training.data_stats import dataset_stats
from training.dataset import open_dataset


def test_the_numbers_are_those_a_policy_is_normalised_with(tmp_path, capsys):
    folders = [write_dataset(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    assert cli.main(["data", "stats", *map(str, folders), "--json", str(tmp_path / "out" / "stats.json")]) == 0
    found = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert [item["dataset"] for item in found] == [str(folder) for folder in folders]
    for item, folder in zip(found, folders, strict=True):
        data = open_dataset(folder)
        assert (item["episodes"], item["frames"], item["hash"]) == (4, 22, data.hash)
        for quantity in ("state", "action"):
            expected = NormStats.of(np.concatenate([getattr(episode, quantity) for episode in data.episodes]))
            assert (
                NormStats.from_json({k: item[quantity][k] for k in expected.to_json()}).to_json() == expected.to_json()
            )
        assert item["state"]["names"] == ["x", "grip"] and item["state"]["units"] == ["m", "1"]
        assert item["action"]["names"] == ["dx", "grip"] and item["warnings"] == []
    text = capsys.readouterr().out
    assert f"{expected.mean[0]:.4g}" in text and "state[grip]" in text and "action[dx]" in text


def test_constant_narrow_and_nearly_constant_dimensions_earn_warnings(tmp_path):
    spec = replace(SPEC, action=(*SPEC.action, ActionDim("base", "m/s", -1.0, 1.0)))
    root = write_dataset(tmp_path / "d", (100, 101), spec=spec)
    action = np.array(column(root, "action"))
    action[:, 0] = 0.25
    action[:, 1] = np.linspace(-0.01, 0.01, 201)
    action[100, 1] = 0.9
    action[:, 2] = 0.0
    action[7, 2] = 1.0
    set_column(root, "action", action.tolist())
    assert dataset_stats(open_dataset(root)).warnings == (
        "action[dx] is constant at 0.25: a model learns nothing of it, and its policy always commands this value",
        "action[grip]: q01..q99 is -0.0098 to 0.0099, min..max -0.01 to 0.9, 46 times as wide: outliers, which min/max "
        "normalisation gives nearly the whole range",
        "action[base] is 0 in at least 98 % of the frames but ranges from 0 to 1: normalisation by quantiles takes it "
        "for a constant",
    )


def test_stats_of_a_dataset_that_cannot_be_opened_are_refused(tmp_path, capsys):
    root = write_dataset(tmp_path / "d")
    action = column(root, "action")
    action[5][0] = float("nan")
    set_column(root, "action", action)
    assert cli.main(["data", "stats", str(root)]) == 2
    assert "episode 1, frame 1: action[dx]: expected a finite number, got nan" in capsys.readouterr().err
    assert cli.main(["data", "stats"]) == 2
    assert "expected at least one dataset folder, got none" in capsys.readouterr().err


@pytest.fixture
def old(tmp_path):
    return write_v21(open_dataset(write_dataset(tmp_path / "new")), tmp_path / "old")


def test_a_converted_dataset_has_every_number_of_the_old_one(old, tmp_path, capsys):
    before = content_hash(old)
    assert cli.main(["data", "convert", str(old), "--out", str(tmp_path / "deep" / "copy")]) == 0
    assert f"{tmp_path / 'deep' / 'copy'}: LeRobot v3.0 copy, 4 episodes, 22 frames" in capsys.readouterr().out
    assert content_hash(old) == before
    copies = open_dataset(tmp_path / "deep" / "copy").episodes
    for one, two in zip(open_dataset(tmp_path / "new").episodes, copies, strict=True):
        assert (one.task, one.success) == (two.task, two.success)
        np.testing.assert_array_equal(one.state, two.state)
        np.testing.assert_array_equal(one.images()["top"], two.images()["top"])
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["copy"]


def refused(capsys, *argv):
    assert cli.main(["data", "convert", *map(str, argv)]) == 2
    return capsys.readouterr().err.partition("\n")[0]


def test_what_cannot_be_converted_is_said_before_anything_is_copied(old, tmp_path, capsys):
    new, out, head = tmp_path / "new", tmp_path / "out", "recap data convert: "
    said = refused(capsys, new, "--out", out)
    assert said == f"{head}{new}: codebase_version: expected v2.1, got v3.0; it needs no conversion"
    said = refused(capsys, old, "--out", new)
    assert said == f"{head}{new}: expected a folder that does not exist yet for the converted copy, got one"
    said = refused(capsys, tmp_path / "none", "--out", out)
    assert (
        said == f"{head}{tmp_path / 'none'}: expected a LeRobot v2.1 dataset (a folder with meta/info.json), got none"
    )
    (old / "meta" / "episodes_stats.jsonl").unlink()
    said = refused(capsys, old, "--out", out)
    assert said == f"{head}{old}: expected the files of a v2.1 dataset, got none of meta/episodes_stats.jsonl"
    assert not out.exists()
