"""`recap values`: shards put together are one run; frames on disk are frames in memory."""

import os
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_factory import TOKENIZER
from recap_model import cli
from recap_model.manifest import read_manifest, verify
from trained import make_data
from training.dataset import open_dataset
from training.labels import read_values
from training.loader import Loader, Sampler
from training.streaming import FrameCacheError, Frames
from training.table import load_table
from training.values import Shard, compute_values, parse_shard


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """dataset/, returns/, critic/, values/ by the commands; one_step/ is the same critic, other weights."""
    root = make_data(tmp_path_factory.mktemp("values"))
    base = ["train", "critic", "--dataset", root / "dataset", "--returns", root / "returns", "--preset", "debug"]
    for name, steps in (("critic", 3), ("one_step", 1)):
        values = root / ("values" if name == "critic" else "other")
        argv = [*base, "--steps", steps, "--out", root / name, "--values-out", values, "--device", "cpu"]
        assert cli.main([str(part) for part in argv]) == 0
    return root


def command(run, out, *more, critic="critic"):
    base = ["values", "--critic", run / critic, "--dataset", run / "dataset", "--out", out, "--device", "cpu"]
    return [str(part) for part in (*base, *more)]


def test_the_values_are_those_that_training_wrote(run, tmp_path):
    assert cli.main(command(run, tmp_path / "values")) == 0
    ours, theirs = verify(tmp_path / "values", "values"), read_manifest(run / "values")
    assert ours.hash == theirs.hash and ours.parents == theirs.parents and ours.metrics == theirs.metrics
    assert os.listdir(tmp_path) == ["values"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_shards_are_one_run_bit_for_bit(run, tmp_path, capsys, order):
    assert cli.main(command(run, tmp_path / "one", "--batch-size", "2")) == 0
    sharded = command(run, tmp_path / "two", "--batch-size", "2", "--shard")
    assert cli.main([*sharded, f"{order[0]}/2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"shard {order[0]}/2 is done" in said and "of 3 parts are missing" in said
    assert not (tmp_path / "two").exists()
    assert cli.main([*sharded, f"{order[1]}/2"]) == 0
    assert verify(tmp_path / "two").hash == verify(tmp_path / "one").hash
    assert cli.main([*sharded, "0/2"]) == 0, "a shard that starts again after the end has nothing to do"
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_a_launchers_ranks_are_shards(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    argv = command(run, tmp_path / "ranks", "--batch-size", "2")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(argv) == 0
        assert (tmp_path / "ranks").exists() == (rank == 1)
    monkeypatch.delenv("WORLD_SIZE")
    assert cli.main(command(run, tmp_path / "one", "--batch-size", "2")) == 0
    assert verify(tmp_path / "ranks").hash == verify(tmp_path / "one").hash


def test_finished_parts_are_kept_and_damaged_ones_are_made_again(run, tmp_path):
    def compute(out, shard=None):
        return compute_values(run / "critic", run / "dataset", out, batch_size=2, shard=shard or Shard(), device="cpu")

    one = compute(tmp_path / "one").manifest
    assert compute(tmp_path / "two", Shard(0, 2)).missing == 2
    assert compute(tmp_path / "two", Shard(1, 3)).missing == 1
    parts = sorted((tmp_path / "two.work").glob("part-*.npy"))
    kept, cut = parts[0].stat().st_mtime_ns, parts[1]
    cut.write_bytes(cut.read_bytes()[:-8])  # as a full disk leaves it
    assert compute(tmp_path / "two", Shard(2, 3)).missing == 1, "a cut part does not count"
    assert parts[0].stat().st_mtime_ns == kept
    assert compute(tmp_path / "two").manifest.hash == one.hash


def test_shards_that_end_together_publish_once(run, tmp_path):
    results = []

    def work(index):
        shard = Shard(index, 3)
        results.append(
            compute_values(run / "critic", run / "dataset", tmp_path / "v", batch_size=2, shard=shard, device="cpu",
                           show=False)
        )  # fmt: skip

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(results) == 3 and any(r.manifest for r in results)
    verify(tmp_path / "v", "values")
    assert os.listdir(tmp_path) == ["v"]


def test_parts_of_another_run_are_refused(run, tmp_path, capsys):
    assert cli.main(command(run, tmp_path / "v", "--batch-size", "2", "--shard", "0/2")) == 0
    assert cli.main(command(run, tmp_path / "v", "--batch-size", "4")) == 2
    assert "holds parts of a run with other batch_size: expected [4], got [2]" in capsys.readouterr().err
    assert cli.main(command(run, tmp_path / "v", "--batch-size", "2", critic="one_step")) == 2
    assert "holds parts of a run with other critic" in capsys.readouterr().err


def test_what_the_critic_has_seen_is_marked(run, tmp_path, capsys):
    dataset = open_dataset(run / "dataset")
    assert cli.main(command(run, tmp_path / "own")) == 0
    np.testing.assert_array_equal(
        read_values(tmp_path / "own", dataset).fold, read_values(run / "values", dataset).fold
    )
    assert cli.main(command(run, tmp_path / "x", "--unseen")) == 2
    assert "--unseen: expected other data" in capsys.readouterr().err
    other = make_data(tmp_path / "more", episodes=4)
    for flags, fold in (((), -1), (("--unseen",), 0)):
        out = tmp_path / f"values{fold}"
        assert cli.main([*command(run, out, *flags), "--dataset", str(other / "dataset")]) == 0
        assert set(read_values(out, open_dataset(other / "dataset")).fold) == {fold}
        assert "returns" not in read_manifest(out).parents and read_manifest(out).metrics == {}


@given(st.integers(0, 200), st.integers(1, 40))
def test_shards_share_the_segments_evenly(segments, count):
    parts = [Shard(index, count).of(segments) for index in range(count)]
    assert [segment for part in parts for segment in part] == list(range(segments))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "a/b", "1/2/3", "/2", "1/"])
def test_shards_that_do_not_exist_are_refused(text):
    with pytest.raises(ValueError, match="--shard: expected i/n with i from 0 to n - 1"):
        parse_shard(text)


class TestFrames:
    def test_batches_from_disk_are_those_from_memory(self, run, tmp_path):
        memory, disk = (load_table(run / "dataset", frames=Frames(kind, tmp_path)).table for kind in ("memory", "disk"))
        assert isinstance(disk.images, np.memmap) and not disk.images.flags.writeable
        sampler, tables = Sampler(np.arange(len(memory)), 16, 0), (memory, disk)
        loaders = [Loader(replace(t, tasks=("pick", "place")), TOKENIZER, chunk=8, dropout=0.3, shift=2, seed=0)
                   for t in tables]  # fmt: skip
        for step in range(6):
            ours, theirs = (load(sampler(step), step) for load in loaders)
            for name in ("images", "state", "tokens", "actions", "valid", "target"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
            assert type(theirs.images) is np.ndarray, "a batch is in memory"

    def test_the_file_is_written_once_and_again_when_it_is_cut(self, tmp_path):
        calls, frames = [], Frames("disk", tmp_path)

        def fill(images):
            calls.append(images.shape)
            images[...] = np.arange(images.size, dtype=np.uint8).reshape(images.shape)

        first = np.array(frames.images("a", (4, 3), fill))
        np.testing.assert_array_equal(frames.images("a", (4, 3), fill), first)
        assert len(calls) == 1
        (path,) = tmp_path.glob("*.npy")
        for cut in (path.read_bytes()[:-1], b"", b"\x93NUMPY", os.urandom(200)):
            path.write_bytes(cut)
            np.testing.assert_array_equal(frames.images("a", (4, 3), fill), first)
        assert len(calls) == 5
        frames.images("a", (3, 4), fill)
        frames.images("b", (4, 3), fill)
        assert len(calls) == 7, "other data, other file"

    def test_a_failure_while_decoding_leaves_no_file(self, tmp_path):
        def fill(_images):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Frames("disk", tmp_path).images("a", (4, 3), fill)
        assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]

    def test_a_full_disk_is_named_before_anything_is_decoded(self, tmp_path):
        def fill(_images):
            raise AssertionError("decoded")

        with pytest.raises(FrameCacheError, match=r"expected room for 1000000000\.0 GB of decoded frames.*--cache"):
            Frames("disk", tmp_path).images("a", (10**18,), fill)

    def test_a_policy_trained_from_disk_is_the_one_trained_from_memory(self, run, tmp_path, capsys):
        base = ["train", "policy", "--dataset", str(run / "dataset"), "--mode", "imitation", "--preset", "debug",
                "--steps", "3", "--device", "cpu"]  # fmt: skip
        assert cli.main([*base, "--out", str(tmp_path / "memory")]) == 0
        assert cli.main([*base, "--out", str(tmp_path / "disk"), "--frames", "disk"]) == 0
        assert len(list((tmp_path / "frames").glob("*.npy"))) == 1
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "disk")]
        assert weights[0] == weights[1]
        assert cli.main([*base, "--out", str(tmp_path / "x"), "--cache", str(tmp_path)]) == 2
        assert "--cache: expected --frames disk" in capsys.readouterr().err
