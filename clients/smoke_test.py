"""Build the wheel, install it into an empty environment, import every module without the simulator, refuse torch.

python clients/smoke_test.py        (needs `uv`, or `pip` and `build`'s network access for setuptools)
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

CHECK = """
import importlib, pkgutil, sys
import recap_client
names = [m.name for m in pkgutil.walk_packages(recap_client.__path__, "recap_client.")]
assert len(names) > 15, names
for name in names:
    importlib.import_module(name)
for absent in ("torch", "transformers", "lerobot", "mujoco", "metaworld", "recap_model"):
    try:
        importlib.import_module(absent)
    except ImportError:
        continue
    raise SystemExit(f"{absent} can be imported: the wheel must not bring it")
from recap_client.robots.base import RobotError
from recap_client.robots.registry import open_robot
try:
    open_robot("metaworld")
except RobotError as error:
    assert "pip install 'recap-client[sim]'" in str(error), error
else:
    raise SystemExit("the simulator opened without its packages")
import numpy as np
from recap_client.wire import pack, unpack
assert (unpack(pack(np.arange(3))) == np.arange(3)).all()
print(f"{len(names)} modules import on Python {sys.version.split()[0]}, numpy {np.__version__}, no torch")
"""


def main(python: str = sys.executable, extra: tuple[str, ...] = ()) -> None:
    """python: interpreter of the new environment; extra: further requirements, e.g. ("numpy<2",)."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copytree(HERE, work / "source", ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
        uv = shutil.which("uv")
        environment = work / "environment"
        interpreter = environment / "bin" / "python"
        if uv:
            run(uv, "build", "--wheel", "--out-dir", str(work / "wheel"), str(work / "source"))
            run(uv, "venv", "--python", python, str(environment))
            install = [uv, "pip", "install", "--python", str(interpreter)]
        else:
            run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(work / "wheel"), str(work / "source"))
            run(python, "-m", "venv", str(environment))
            install = [str(interpreter), "-m", "pip", "install"]
        wheel = next((work / "wheel").glob("recap_client-*.whl"))
        run(*install, str(wheel), *extra)
        run(str(interpreter), "-I", "-c", CHECK)
        run(str(environment / "bin" / "recap-client"), "--help", quiet=True)


def run(*command: str, quiet: bool = False) -> None:
    """Run a command outside the checkout, so that only the wheel can be imported."""
    subprocess.run(command, check=True, cwd=tempfile.gettempdir(), stdout=subprocess.DEVNULL if quiet else None)


if __name__ == "__main__":
    main(*sys.argv[1:2], extra=tuple(sys.argv[2:]))
    print("smoke test passed")
