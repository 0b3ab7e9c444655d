"""A folder with a manifest is finished, whole, and says what it was made from."""

import json
from pathlib import Path

import pytest

from recap_model.manifest import (
    NAME,
    ManifestError,
    content_hash,
    publish,
    read_manifest,
    require_parent,
    verify,
    write_manifest,
)


def fill(folder: Path, text: str = "a") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "x.bin").write_bytes(text.encode())


def test_round_trip(tmp_path):
    fill(tmp_path)
    written = write_manifest(tmp_path, "returns", parents={"dataset": "ab"}, parameters={"n": 5}, metrics={"frames": 7})
    assert read_manifest(tmp_path, "returns") == written == verify(tmp_path)


@pytest.mark.parametrize("change", ["bytes", "name", "extra", "removed"])
def test_any_change_of_the_files_is_noticed(tmp_path, change):
    fill(tmp_path)
    write_manifest(tmp_path, "returns")
    file = tmp_path / "data" / "x.bin"
    if change == "bytes":
        file.write_bytes(b"b")
    elif change == "name":
        file.rename(file.with_name("y.bin"))
    elif change == "extra":
        file.with_name("y.bin").write_bytes(b"")
    else:
        file.unlink()
    with pytest.raises(ManifestError, match="content hash: expected"):
        verify(tmp_path)


def test_the_hash_depends_on_content_not_on_place(tmp_path):
    fill(tmp_path / "one")
    fill(tmp_path / "two")
    write_manifest(tmp_path / "two", "x")
    assert content_hash(tmp_path / "one") == content_hash(tmp_path / "two")


def test_no_manifest_another_kind_and_another_schema_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="not finished"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, "critic")
    with pytest.raises(ManifestError, match=r"expected 'returns', got 'critic'"):
        read_manifest(tmp_path, "returns")
    data = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps({**data, "schema": 99}))
    with pytest.raises(ManifestError, match="schema: expected 1, got 99"):
        read_manifest(tmp_path)


def test_another_parent_is_refused(tmp_path):
    manifest = write_manifest(tmp_path, "values", parents={"dataset": "a" * 64})
    require_parent(manifest, "dataset", "a" * 64, where="here")
    with pytest.raises(ManifestError, match=r"here: made from another dataset: expected hash bbbb.*got aaaa"):
        require_parent(manifest, "dataset", "b" * 64, where="here")
    with pytest.raises(ManifestError, match="another critic"):
        require_parent(manifest, "critic", "b" * 64, where="here")


def interrupted(folder: Path) -> None:
    with publish(folder) as temporary:
        fill(temporary, "new")
        raise OSError("the disk is full")


class TestPublish:
    def test_an_error_leaves_nothing(self, tmp_path):
        with pytest.raises(OSError, match="disk"):
            interrupted(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_an_error_keeps_what_was_there(self, tmp_path):
        fill(tmp_path / "out", "old")
        with pytest.raises(OSError, match="disk"):
            interrupted(tmp_path / "out")
        assert (tmp_path / "out" / "data" / "x.bin").read_text() == "old"

    def test_it_replaces_the_whole_folder(self, tmp_path):
        fill(tmp_path / "out", "old")
        (tmp_path / "out" / "left.over").touch()
        with publish(tmp_path / "out") as folder:
            fill(folder, "new")
            assert (tmp_path / "out" / "left.over").exists()
        assert (tmp_path / "out" / "data" / "x.bin").read_text() == "new"
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert not (tmp_path / "out" / "left.over").exists()

    def test_what_a_killed_process_left_is_removed(self, tmp_path):
        import os
        import subprocess
        import sys

        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        left, foreign = tmp_path / f".out.{dead.pid}.tmp", tmp_path / f".out.{os.getppid()}.tmp"
        for folder in (left, foreign):
            folder.mkdir()
            (folder / "half").write_text("x")
        with publish(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
        assert not left.exists() and foreign.exists()  # the parent lives: it may be publishing now
