"""Every locked package of serving has a licence on the page, of the version that is locked."""

import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/licences"


def loaded() -> ModuleType:
    spec = spec_from_loader("licences", SourceFileLoader("licences", str(SCRIPT)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_names_every_locked_package() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_page_says_what_the_packages_say() -> None:
    script = loaded()
    page = (ROOT / "docs/licences.md").read_text().splitlines()
    assert page[-len(script.locked()) :] == script.rows()


def test_a_package_without_a_row_or_with_an_old_one_is_seen() -> None:
    script = loaded()
    page = (ROOT / "docs/licences.md").read_text()
    pins = script.locked()
    assert script.missing(page) == []
    assert script.missing(page.replace(f"| numpy | {pins['numpy']} |", "| numpy | 1.0 |")) == [f"numpy {pins['numpy']}"]
    assert script.missing(re.sub(r"\| fastapi \|.*\n", "", page)) == [f"fastapi {pins['fastapi']}"]


def test_nothing_is_served_with_a_licence_that_forbids_it() -> None:
    for line in loaded().rows():
        assert not re.search(r"\b(A?GPL|SSPL|proprietary|non-?commercial)", line.replace("LGPL", ""), re.IGNORECASE), (
            line
        )
