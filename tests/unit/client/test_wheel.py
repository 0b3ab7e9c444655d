"""The wheel alone, in an empty environment."""

import subprocess
import sys
from pathlib import Path

import pytest

CLIENTS = Path(__file__).resolve().parents[3] / "clients"


@pytest.mark.slow
@pytest.mark.parametrize("numpy", ["numpy>=2", "numpy<2"])
def test_wheel_in_an_empty_environment(numpy: str) -> None:
    command = [sys.executable, str(CLIENTS / "smoke_test.py"), sys.executable, numpy]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "smoke test passed" in done.stdout, done.stdout + done.stderr
