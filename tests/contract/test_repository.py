"""Rules about the files themselves: sizes, addresses, locks, and promises made by the README and the Makefile."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tracked() -> list[Path]:
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def text_files() -> dict[Path, str]:
    found = {}
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data[:4096]:
            found[path] = data.decode(errors="replace")
    return found


def test_modules_are_small() -> None:
    large = {
        str(path.relative_to(ROOT)): count
        for path in tracked()
        if path.suffix == ".py" and (count := path.read_text().count("\n")) >= 400
    }
    assert large == {}


def test_no_machine_paths_or_private_addresses() -> None:
    """Nothing tracked names a home folder, a mount or a private host; documentation addresses are public ones."""
    wrong = re.compile(
        r"/(?:work|home|root|Users|mnt)/[a-z]|\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2,3}\b"
    )
    here = Path(__file__).resolve()
    hits = {
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path, text in text_files().items()
        if path != here and path.suffix not in (".txt", ".svg")
        for match in wrong.finditer(text)
    }
    assert hits == set()


def test_shipped_models_are_small_whole_and_name_no_machine() -> None:
    from recap_model.manifest import verify

    root = ROOT / "assets/model_repository"
    for name in ("policy", "policy_guided", "critic"):
        manifest = verify(root / name / "1", "model")
        assert manifest.parents["checkpoint"] and manifest.parameters["training"]
    files = [path for path in root.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    wrong = re.compile(rb"/(?:work|home|root|Users|mnt|tmp)/[A-Za-z]|site-packages/")
    assert [path.name for path in files if wrong.search(path.read_bytes())] == []


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_locks_are_plain(path: Path) -> None:
    """One `name==version` a line: no addresses, no index, no hashes, no ranges."""
    lines = path.read_text().splitlines()
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[A-Za-z0-9.+!]+", line)] == []


def test_the_demo_environment_is_light_and_agrees_with_the_full_one() -> None:
    demo, full = (
        dict(line.split("==") for line in (ROOT / f"requirements/{name}.txt").read_text().split())
        for name in ("demo", "full")
    )
    assert not {"torch", "lerobot", "transformers"} & set(demo)
    assert not [name for name in demo if name.startswith("nvidia")]
    assert {name: full.get(name) for name in demo} == demo
    assert demo["mujoco"] == "3.8.1"  # 4.x breaks metaworld 3.0.0
    assert full["lerobot"] == "0.6.1"


def test_no_lock_with_addresses() -> None:
    assert [path.name for path in tracked() if path.name in ("uv.lock", "poetry.lock", "Pipfile.lock")] == []


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_in(text: str) -> set[str]:
    """Lines of code blocks and inline code that start with make, recap or recap-client."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    return {line for line in lines if re.match(r"(make|recap|recap-client) [a-z]", line)}


def test_documents_name_only_commands_that_exist() -> None:
    from recap_model.cli import COMMANDS

    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    robot_side = {"run", "replay", "bench", "info", "spec"}
    wrong = set()
    for document in documents():
        for command in commands_in(document.read_text()):
            tool, *words = command.split()
            names = {words[0], " ".join(words[:2])}
            groups = {name.split()[0] for name in COMMANDS}
            bare = groups if len(words) == 1 else set()
            known = {"make": verbs, "recap": set(COMMANDS) | bare, "recap-client": robot_side}[tool]
            if not names & known and "|" not in words[0]:
                wrong.add(f"{document.name}: {command}")
    assert wrong == set()


def test_document_links_exist() -> None:
    wrong = set()
    for document in [*documents(), ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
            if "://" not in target and not (document.parent / target).exists():
                wrong.add(f"{document.name}: {target}")
    assert wrong == set()


def test_architecture_page_is_short() -> None:
    assert len((ROOT / "docs/architecture.md").read_text().splitlines()) <= 60


def test_continuous_integration_is_make_test() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text()
    verbs = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert verbs[:2] == ["demo", "test"]
