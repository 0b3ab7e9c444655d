"""Key files: what is written is read, nothing secret is in them, and a broken file is named by its line."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recap_model import cli
from services.common.keys import (
    SCOPES,
    KeyFileError,
    changing,
    matching,
    new_key,
    read_keys,
    readable_by_others,
    write_keys,
)
from services.common.settings import Quota

POSITIVE = st.none() | st.floats(1, 1e9)
QUOTAS = st.builds(Quota, rate=POSITIVE, bytes_per_s=POSITIVE, sessions=st.none() | st.integers(1, 99))
IDS = st.from_regex(r"[a-z0-9][a-z0-9-]{0,31}", fullmatch=True)


@given(st.dictionaries(IDS, QUOTAS, max_size=4), st.sets(st.sampled_from(SCOPES), min_size=1))
def test_what_is_written_is_read_and_each_key_opens_its_own_line(
    tmp_path_factory: pytest.TempPathFactory, quotas: dict[str, Quota], scopes: set[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    made = [new_key(name, sorted(scopes), quota, expires=9e9) for name, quota in quotas.items()]
    write_keys(path, {key.id: key for key, _ in made})
    found = read_keys(path)
    assert found == {key.id: key for key, _ in made}
    for key, text in made:
        assert matching(found, text) == key
        assert matching(found, text[:-1]) is None and matching(found, text + "x") is None
        assert text.partition(".")[2] not in path.read_text()


@given(st.text(max_size=300))
def test_no_other_text_is_a_key(text: str) -> None:
    key, _ = new_key("arm")
    assert matching({"arm": key}, text) is None
    assert matching({"arm": key}, f"recap_arm.{text}") is None
    assert matching({}, f"recap_nobody.{text}") is None


def test_a_file_belongs_to_its_owner_alone_and_keeps_the_mode_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key, _ = new_key("arm")
    write_keys(path, {"arm": key})
    assert path.stat().st_mode & 0o777 == 0o600 and not readable_by_others(path)
    path.chmod(0o644)
    write_keys(path, {})
    assert path.stat().st_mode & 0o777 == 0o644 and readable_by_others(path)
    assert list(tmp_path.iterdir()) == [path]


def line(**change: object) -> str:
    return json.dumps({"id": "arm", "salt": "01" * 16, "sha256": "02" * 32} | change)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1"),
        ("[]", "expected a map with id, salt, sha256"),
        (line(colour="red"), "no others than"),
        (line(id="Arm 1"), "id: expected 1 to 32 of a-z"),
        (line(salt="00"), "16 and 32 bytes"),
        (line(sha256="zz"), "line 1"),
        (line(scopes=["fly"]), "scopes: expected some of act, value, admin, got ['fly']"),
        (line(scopes="act"), "scopes: expected a list, got str"),
        (line(quota={"rate": -1}), "rate: expected a number above 0"),
        (line(quota={"speed": 1}), "speed"),
        (line(expires="tomorrow"), "expires: expected seconds since the epoch, got 'tomorrow'"),
        (line() + "\n\n" + line(), "line 3: expected a key as `recap keys add` writes it: id 'arm' a second time"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(KeyFileError) as error:
        read_keys(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_a_file_that_everyone_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("")
    path.chmod(0o602)
    with pytest.raises(KeyFileError, match="everyone may write here"):
        read_keys(path)
    with pytest.raises(KeyFileError, match="recap keys add"):
        read_keys(tmp_path / "none")


def test_two_writers_do_not_lose_each_others_keys(tmp_path: Path) -> None:
    words = r"another `recap keys`; if there is none, delete .*keys\.lock"
    with changing(tmp_path / "keys"), pytest.raises(KeyFileError, match=words), changing(tmp_path / "keys"):
        pass
    with changing(tmp_path / "keys"):
        pass


def test_the_command_adds_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "keys")
    assert cli.main(["keys", "add", path, "--id", "arm-1", "--scopes", "act", "--rate", "20", "--days", "2"]) == 0
    text = capsys.readouterr().out.strip()
    key = matching(read_keys(Path(path)), text)
    assert key is not None and (key.scopes, key.quota) == (("act",), Quota(rate=20.0))
    assert key.expires is not None and key.created is not None and key.expires - key.created == 2 * 86400
    assert cli.main(["keys", "list", path]) == 0
    shown = capsys.readouterr().out
    assert "arm-1" in shown and "good until" in shown and "rate 20" in shown and text.partition(".")[2] not in shown
    assert cli.main(["keys", "add", path, "--id", "arm-1"]) == 2
    assert "the id 'arm-1' is taken" in capsys.readouterr().err
    assert cli.main(["keys", "revoke", path, "arm-2"]) == 2
    assert "expected one of arm-1, got 'arm-2'" in capsys.readouterr().err
    assert cli.main(["keys", "revoke", path, "arm-1"]) == 0
    revoked = matching(read_keys(Path(path)), text)
    assert revoked is not None and revoked.trouble(0.0) == "revoked"
    assert os.listdir(tmp_path) == ["keys"]
