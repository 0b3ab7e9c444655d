"""`make test` fails when something is skipped that is not on the list: the plugin is tried on a small suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).resolve().parents[1]


def run(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(HELPERS)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no_skips", "-p", "no:cacheprovider", *options, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)


@pytest.mark.parametrize("options", [(), ("-n", "2")])
def test_a_skip_fails_the_run(tmp_path: Path, options: tuple[str, ...]) -> None:
    skipping = "import pytest\n\ndef test_a():\n    pytest.skip('no driver')\n\ndef test_b(): ...\n"
    done = run(tmp_path, skipping, *options)
    assert done.returncode == 1, done.stdout
    assert "SKIPPED WITHOUT LEAVE" in done.stdout
    assert "no driver" in done.stdout


def test_a_skipped_module_fails_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, "import pytest\n\npytest.importorskip('no_such_package')\n\ndef test_a(): ...\n")
    assert done.returncode != 0
    assert "SKIPPED WITHOUT LEAVE" in done.stdout


def test_passing_and_deselected_tests_do_not(tmp_path: Path) -> None:
    done = run(tmp_path, "def test_a(): ...\n\ndef test_b(): ...\n", "-k", "test_a")
    assert done.returncode == 0, done.stdout
