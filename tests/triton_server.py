"""A real Triton on free loopback ports, and repositories that its python backend serves.

The server is the one that `scripts/triton-env` installs: in the folder named by RECAP_TRITON_ENV, else in the user's
cache.
"""

import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from exporters.triton_config import TritonOptions
from exporters.triton_repository import write_backend, write_configuration
from recap_model.manifest import write_manifest
from repository_factory import build_repository
from service_harness import eventually
from services.common.server import Running, running
from services.common.settings import PolicySettings
from services.policy.app import create_app
from services.policy.pipeline import load_policy_engine

_DTYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
BATCH_SIZES = (1, 2, 4, 8)
_REGIONS = "triton_python_backend_shm_region_*"


def environment() -> Path:
    """The folder of `scripts/triton-env`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = Path(os.environ.get("RECAP_TRITON_ENV", cache / "recap" / "triton"))
    assert (folder / "bin" / "tritonserver").is_file(), f"{folder}: no Triton here; make it with scripts/triton-env"
    return folder


def serve_by_triton(model: Path, options: TritonOptions | None = None) -> None:
    """Make a model folder of `repository_factory` one that Triton serves, as the exporter would."""
    options = options or TritonOptions("python")
    versions = sorted(p for p in model.iterdir() if p.name.isdecimal())
    for version in versions:
        write_backend(version, options)
        write_manifest(version, "model", parameters={"batch_sizes": BATCH_SIZES})
    session = onnxruntime.InferenceSession(str(versions[0] / "model.onnx"))
    examples = [
        {item.name: np.ones((1, *item.shape[1:]), _DTYPES[item.type]) for item in items}
        for items in (session.get_inputs(), session.get_outputs())
    ]
    write_configuration(model, examples[0], examples[1], BATCH_SIZES, options, model.name)


def triton_repository(root: Path, **options: Any) -> Path:
    """`build_repository`, for Triton's python backend."""
    build_repository(root, **options)
    for model in root.iterdir():
        serve_by_triton(model)
    return root


class Triton:
    """A server process; `kill` and `start` may follow each other on the same ports."""

    def __init__(self, models: Path, *options: str) -> None:
        self.models, self.options = models, options
        self.http, self.grpc, self.metrics = free_ports(3)
        self._process: subprocess.Popen[bytes] | None = None
        self._before: set[Path] = set()
        self.log = models.parent / f"triton-{self.http}.log"

    def url(self, scheme: str, options: str = "") -> str:
        return f"{scheme}://127.0.0.1:{self.http if scheme == 'http' else self.grpc}{options}"

    def start(self, *, wait: bool = True) -> None:
        ports = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}
        command = [str(environment() / "bin" / "tritonserver"), f"--model-repository={self.models}"]
        command += [f"--{name}-port={port}" for name, port in ports.items()]
        command += [f"--{name}-address=127.0.0.1" for name in ports]
        command += ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0", "--exit-timeout-secs=3"]
        self._before = set(Path("/dev/shm").glob(_REGIONS))
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([*command, *self.options], stdout=log, stderr=log, start_new_session=True)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until all models are ready."""
        eventually(self._ready, 120.0)

    def _ready(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.log.read_text()[-3000:]
        return self.get("/v2/health/ready") == 200

    def get(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=5) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def metric(self, name: str, **labels: str) -> float:
        """A value from the metrics page."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=5) as reply:
            lines = reply.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [line for line in lines if line.startswith(name + "{") and all(label in line for label in wanted)]
        assert len(found) == 1, (name, labels, found)
        return float(found[0].rsplit(" ", 1)[1])

    def kill(self) -> None:
        """The server and its models' processes, as in a crash: nothing is closed in good order."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(20)
            for left in set(Path("/dev/shm").glob(_REGIONS)) - self._before:  # which a killed server leaves behind
                left.unlink(missing_ok=True)


@contextmanager
def triton(models: Path, *options: str) -> Iterator[Triton]:
    server = Triton(models, *options)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@contextmanager
def policy_service(models: Path, url: str) -> Iterator[Running]:
    """A policy service over the Triton at `url`."""
    app = create_app(load_policy_engine(models, 1.0, f"triton@{url}"), PolicySettings())
    with running(app, app.state.limits) as bound:
        yield bound
