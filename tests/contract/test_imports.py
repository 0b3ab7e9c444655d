"""Import rules, each held in a fresh interpreter: what an import loads, and that importing changes nothing."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "lerobot")
# robots/metaworld.py needs the simulator (extra `sim`), which is present here; robots/lerobot.py needs lerobot by name.
# services/common/torch_engine.py runs torch; services.common.engine imports it by name when that engine is asked for.
TORCH_ENGINE = "services.common.torch_engine"
EXCEPTIONS = {"recap_client.robots.lerobot": ("lerobot", "torch", "transformers"), TORCH_ENGINE: ("torch",)}


def modules(package: str, folder: Path) -> list[str]:
    found = [
        info.name for info in pkgutil.walk_packages([str(folder)], package + ".") if not info.name.endswith("__main__")
    ]
    return [package, *sorted(found)]


def light_modules() -> list[str]:
    """Everything that serves or moves a robot, and the library outside its torch sub-packages."""
    names = modules("services", ROOT / "services") + modules("recap_client", ROOT / "clients/recap_client")
    names += [
        name
        for name in modules("recap_model", ROOT / "recap_model")
        if name.split(".")[1:2] not in (["policy"], ["critic"])
    ]
    return [name for name in names if name not in EXCEPTIONS]


def all_modules() -> list[str]:
    applications = modules("training", ROOT / "training") + modules("exporters", ROOT / "exporters")
    return [*light_modules(), TORCH_ENGINE, *modules("recap_model", ROOT / "recap_model"), *applications]


def loaded_by(names: list[str], watch: tuple[str, ...]) -> dict[str, list[str]]:
    """Import `names` one after the other in one fresh interpreter; which of `watch` each one brought in."""
    code = (
        "import importlib, json, sys\n"
        f"names, watch = {names!r}, {watch!r}\n"
        "brought = {}\n"
        "for name in names:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(name)\n"
        "    new = [w for w in watch if w in sys.modules and w not in before]\n"
        "    if new: brought[name] = new\n"
        "print(json.dumps(brought))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    result: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_what_serves_or_moves_a_robot_loads_no_torch() -> None:
    assert loaded_by(light_modules(), HEAVY) == {}


def test_the_torch_engine_is_loaded_by_name_only() -> None:
    assert TORCH_ENGINE in modules("services", ROOT / "services")
    assert loaded_by(light_modules(), (TORCH_ENGINE,)) == {}
    assert loaded_by([TORCH_ENGINE], HEAVY) == {TORCH_ENGINE: ["torch"]}


def test_the_boundary_test_can_fail() -> None:
    assert loaded_by(["recap_model.policy.model"], HEAVY) == {"recap_model.policy.model": ["torch"]}


def test_the_robot_side_loads_nothing_of_ours() -> None:
    ours = ("recap_model", "training", "exporters", "services")
    names = [name for name in modules("recap_client", ROOT / "clients/recap_client") if name not in EXCEPTIONS]
    assert loaded_by(names, ours) == {}


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom recap_model.cli import main\nassert main(['--help']) == 0\n"
        "heavy = {'numpy', 'tyro', 'rich', 'asyncio', 'tokenizers', 'fastapi', 'torch', 'matplotlib', 'mujoco'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train critic" in done.stdout


def test_importing_has_no_side_effect(tmp_path: Path) -> None:
    """Importing everything prints nothing, writes no file, starts no thread, changes no environment variable or logger,
    and leaves the global random generators alone."""
    code = (
        "import importlib, logging, os, random, signal, sys, threading\n"
        "import numpy as np\n"
        f"names = {all_modules()!r}\n"
        # third-party packages first: what torch or mujoco do on import is not ours to promise
        "for name in ('torch', 'lerobot.datasets.lerobot_dataset', 'tyro', 'metaworld', 'matplotlib', 'av', 'uvicorn', "
        "'fastapi', 'structlog', 'onnxruntime', 'onnxscript', 'transformers'):\n"
        "    importlib.import_module(name)\n"
        "def world():\n"
        "    return (dict(os.environ), threading.active_count(), list(logging.getLogger().handlers), "
        "logging.getLogger().level, random.getstate(), np.random.get_state()[1].tolist(), "
        "[signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], os.getcwd(), list(sys.path))\n"
        "print('=====')\n"
        "for name in names:\n"
        "    before = world()\n"
        "    importlib.import_module(name)\n"
        "    assert world() == before, f'{name} changed the process on import'\n"
        "print('=====')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("=====")[1].strip() == ""
    assert list(tmp_path.iterdir()) == []


def command_targets() -> dict[str, str]:
    from recap_model.cli import COMMANDS

    return {name: target for name, (target, _) in COMMANDS.items()}


@pytest.mark.parametrize("name", sorted(command_targets()))
def test_every_command_exists(name: str) -> None:
    import importlib

    module, _, function = command_targets()[name].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
