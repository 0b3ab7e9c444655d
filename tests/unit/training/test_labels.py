"""Label folders: what is written comes back aligned, and what does not fit is refused."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recap_model import cli
from recap_model.advantage import LabelRules
from recap_model.manifest import ManifestError, read_manifest, write_manifest
from sample_rollouts import make_dataset
from training.dataset import open_dataset
from training.labels import (
    LabelError,
    load_labels,
    load_returns,
    make_labels,
    make_returns,
    read_values,
    write_values,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_dataset(make_dataset(tmp_path_factory.mktemp("labels")))


@pytest.fixture
def labels(data, tmp_path):
    """A folder with returns/ and values/ of a critic that is right up to noise."""
    make_returns(data, tmp_path / "returns")
    truth = load_returns(tmp_path / "returns", data).values
    value = np.clip(truth + np.random.default_rng(0).normal(0, 0.1, len(truth)), -1, 0)
    write_values(tmp_path / "values", *data.keys(), value, np.arange(len(value)) % 2, dataset_hash=data.hash,
                 critic_hash="c" * 64, returns_hash=load_returns(tmp_path / "returns", data).hash)  # fmt: skip
    return tmp_path


def test_returns_are_those_of_every_episode(data, labels):
    loaded = load_returns(labels / "returns", data)
    row = 0
    for episode in data.episodes:
        values = loaded.values[row : row + len(episode)]
        if episode.success:
            np.testing.assert_allclose(values, -np.arange(len(episode) - 1, -1, -1) / loaded.t_max[episode.task])
        else:
            assert (values == -1).all()
        row += len(episode)
    lengths = {task: max(len(e) for e in data.episodes if e.task == task and e.success) for task in loaded.t_max}
    assert loaded.t_max == lengths
    assert read_manifest(labels / "returns").parents == {"dataset": data.hash}


def test_labels_are_aligned_whatever_the_order_of_rows_in_the_file(data, labels):
    make_labels(data, labels / "returns", labels / "values", labels / "advantage", LabelRules(n=3))
    expected = load_labels(labels, data)
    path = labels / "advantage" / "advantage.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(table.num_rows)), path)
    write_manifest(labels / "advantage", "advantage", parents=read_manifest(labels / "advantage").parents)
    got = load_labels(labels / "advantage", data)
    for name in ("returns", "values", "advantage", "threshold", "indicator", "source"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


def test_labels_follow_the_mathematics(data, labels):
    make_labels(data, labels / "returns", labels / "values", labels / "advantage",
                LabelRules(n=None, positive_fraction=0.5, demonstration_fraction=0.5))  # fmt: skip
    got = load_labels(labels, data)
    np.testing.assert_allclose(got.advantage, got.returns - got.values, atol=1e-12)
    human = np.concatenate([e.intervention for e in data.episodes])
    np.testing.assert_array_equal(got.indicator == 1, (got.advantage > got.threshold) | human)
    assert got.indicator.dtype == np.int8 and set(got.source) <= {"computed", "intervention"}


def test_the_manifest_names_every_parent_and_the_audit_lies_beside_it(data, labels):
    manifest, audit = make_labels(data, labels / "returns", labels / "values", labels / "advantage", LabelRules(n=3))
    assert set(manifest.parents) == {"dataset", "returns", "values", "critic"}
    assert manifest.parameters["n"] == 3 and "V_{t+n}" in manifest.parameters["formula"]
    saved = json.loads((labels / "advantage" / "audit.json").read_text())
    assert sum(row["frames"] for row in saved["rows"]) == data.frames
    assert "Label audit" in (labels / "advantage" / "audit.html").read_text() and audit.rows


class TestOutcomes:
    @pytest.fixture
    def unknown(self, data, tmp_path):
        root = shutil.copytree(data.root, tmp_path / "unknown")
        (root / "manifest.json").unlink()
        for path in (root / "data").glob("*/*.parquet"):
            pq.write_table(pq.read_table(path).drop_columns(["success"]), path)
        return open_dataset(root)

    def test_a_dataset_without_outcomes_is_refused_with_the_column_and_the_flag(self, unknown, tmp_path):
        with pytest.raises(LabelError, match=r"8 of 8 episodes .*column `success`.*--all-successful"):
            make_returns(unknown, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_all_successful_declares_them(self, unknown, tmp_path):
        make_returns(unknown, tmp_path / "out", all_successful=True)
        assert (load_returns(tmp_path / "out", unknown).values > -1).all()

    def test_all_successful_against_recorded_failures_is_refused(self, data, tmp_path):
        with pytest.raises(LabelError, match=r"contradicts the data: 2 episodes"):
            make_returns(data, tmp_path / "out", all_successful=True)


class TestRefusals:
    @pytest.fixture
    def other(self, data, tmp_path):
        root = shutil.copytree(data.root, tmp_path / "other")
        (root / "manifest.json").unlink()
        return open_dataset(root)

    @pytest.mark.parametrize("load", [load_returns, read_values, load_labels])
    def test_labels_of_another_dataset(self, data, labels, other, load):
        make_labels(data, labels / "returns", labels / "values", labels / "advantage", LabelRules(n=3))
        folder = {load_returns: "returns", read_values: "values", load_labels: "advantage"}[load]
        with pytest.raises(ManifestError, match=f"another dataset: .*{other.hash[:12]}, got {data.hash[:12]}"):
            load(labels / folder, other)

    def test_values_made_for_other_returns(self, data, labels):
        make_returns(data, labels / "returns", t_max_quantile=0.5)
        with pytest.raises(ManifestError, match="another returns"):
            make_labels(data, labels / "returns", labels / "values", labels / "advantage", LabelRules())

    def test_a_file_changed_by_hand(self, data, labels):
        path = labels / "values" / "values.parquet"
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(ManifestError, match="content hash"):
            read_values(labels / "values", data)

    def test_rows_that_are_missing(self, data, labels):
        episode, frame = data.keys()
        write_values(labels / "values", episode[1:], frame[1:], np.zeros(data.frames - 1), np.zeros(data.frames - 1),
                     dataset_hash=data.hash, critic_hash="c")  # fmt: skip
        with pytest.raises(LabelError, match=f"{data.frames} frames .*got {data.frames - 1} rows"):
            read_values(labels / "values", data)

    @pytest.mark.parametrize("bad", [np.nan, 0.5, -1.5])
    def test_values_that_are_no_values(self, data, tmp_path, bad):
        values = np.full(data.frames, -0.5)
        values[7] = bad
        with pytest.raises(ValueError, match="value"):
            write_values(tmp_path / "v", *data.keys(), values, np.zeros(data.frames), dataset_hash="d", critic_hash="c")
        assert not (tmp_path / "v").exists()

    def test_nan_smuggled_into_a_label_file(self, data, labels):
        path = labels / "values" / "values.parquet"
        table = pq.read_table(path)
        place = table.column_names.index("value")
        spoilt = table.column("value").to_numpy().copy()
        spoilt[3] = np.nan
        pq.write_table(table.set_column(place, "value", pa.array(spoilt)), path)
        write_manifest(labels / "values", "values", parents=read_manifest(labels / "values").parents)
        with pytest.raises(ValueError, match=r"value: expected finite numbers, got 1 NaN"):
            make_labels(data, labels / "returns", labels / "values", labels / "advantage", LabelRules())


def test_the_commands(data, labels, capsys):
    assert cli.main(["returns", "--dataset", str(data.root), "--out", str(labels / "r2"), "--c-fail", "3"]) == 0
    assert "warning" in capsys.readouterr().out
    command = ["label", "--dataset", str(data.root), "--returns", str(labels / "returns"), "--values",
               str(labels / "values"), "--out", str(labels / "advantage")]  # fmt: skip
    assert cli.main([*command, "--n", "3", "--failures-negative"]) == 0
    assert "label audit" in capsys.readouterr().out
    assert load_labels(labels, data).indicator.max() == 1
    assert cli.main([*command, "--n", "episode"]) == 0
    assert read_manifest(labels / "advantage").parameters["n"] is None
    assert cli.main([*command, "--positive-fraction", "2"]) == 2
    assert "positive_fraction: expected a share" in capsys.readouterr().err
