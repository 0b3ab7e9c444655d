"""What the way to Triton costs: `python -m benchmarks.hop`.

A model that does next to nothing (uint8 images in, a small array out) is asked by every transport of the Triton engine,
in turns, so that a busy moment of the machine hits all of them alike. The model's own time in Triton (its statistics:
input, compute, output) is printed beside. The last line is JSON.
"""

import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from services.common.triton_api import Call, Part, Tensor, Transport, parse_url, tensors
from services.common.triton_connect import connect
from services.common.triton_memory import Layout, Slot, Slots

WAYS = ("grpc", "http", "grpc+shm", "http+shm")

_MODEL = """
import ctypes
import numpy as np
import triton_python_backend_utils as pb_utils

ANSWER = np.arange(50 * 32, dtype=np.float32).reshape(1, 50, 32)


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            images = np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "images"))
            capsule = (ANSWER + images.flat[0]).astype(np.float32).__dlpack__()
            tensor = pb_utils.Tensor.from_dlpack("actions", capsule)
            ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), b"used_dltensor")
            answers.append(pb_utils.InferenceResponse(output_tensors=[tensor]))
        return answers
"""


@dataclass(frozen=True)
class HopArgs:
    """The hop between the service and Triton, by transport."""

    server: Path
    """The tritonserver to start: what `scripts/triton-env` prints."""
    shape: tuple[int, ...] = (3, 512, 512, 3)
    """Of the uint8 input."""
    requests: int = 300
    """Measured ones, of each transport."""
    warm_up: int = 30
    region: int = 16 << 20
    """Bytes of shared memory between Triton and its python model at the start."""


def main(argv: list[str] | None = None) -> int:
    """Measure; the last line is JSON."""
    args = tyro.cli(HopArgs, args=argv, prog="python -m benchmarks.hop", description=HopArgs.__doc__)
    with tempfile.TemporaryDirectory() as folder, _server(args, Path(folder)) as ports:
        ways = {way: _Way(way, ports) for way in WAYS}
        frames = np.random.default_rng(0).integers(0, 256, (1, *args.shape), np.uint8)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(args.warm_up + args.requests):
            frames.flat[0] = i % 251
            for name, way in ways.items():
                start = time.perf_counter()
                answer = way.ask(frames)
                took = time.perf_counter() - start
                assert answer[0, 0, 1] == 1 + i % 251, "the answer is not of this request"
                if i >= args.warm_up:
                    times[name].append(1000 * took)
        inside_ms = _inside_ms(ports["http"])
    rows = {name: _summary(values) for name, values in times.items()}
    print(f"uint8 {list(args.shape)}, {frames.nbytes / 1e6:.2f} MB; load average {os.getloadavg()[0]:.1f}")
    print(f"{'transport':<10}{'p50 ms':>9}{'p90 ms':>9}{'p99 ms':>9}{'min ms':>9}")
    for name, row in rows.items():
        print(f"{name:<10}" + "".join(f"{row[key]:9.2f}" for key in ("p50", "p90", "p99", "min")))
    print(f"of which inside Triton and its model, mean of all: {inside_ms:.2f} ms")
    print(
        json.dumps(
            {
                "benchmark": "hop",
                "bytes": frames.nbytes,
                "requests": args.requests,
                "load": round(os.getloadavg()[0], 2),
                "cpus": os.cpu_count(),
                "ms": rows,
                "inside_ms": round(inside_ms, 3),
            }
        )
    )
    return 0


class _Way:
    def __init__(self, way: str, ports: dict[str, int]) -> None:
        scheme, _, shm = way.partition("+")
        self._transport: Transport = connect(parse_url(f"{scheme}://127.0.0.1:{ports[scheme]}"))
        config = self._transport.config("hop", "1", 10.0)
        (self._in,), (self._out,) = tensors(config, "input"), tensors(config, "output")
        self._layout = Layout.of((self._in, self._out), 1)
        self._slot: Slot | None = None
        if shm:
            self._slot = Slots(self._layout.size, self._transport.register, _refused).take(10.0)

    def ask(self, frames: NDArray[np.uint8]) -> NDArray[Any]:
        """As the engine does it, copies included."""
        at = self._layout.offsets
        if self._slot is None:
            given, wanted = Part(self._in, 1, data=frames), Part(self._out, 1)
        else:
            given = self._slot.put(self._in, frames, at["images"])
            wanted = Part(self._out, 1, region=self._slot.name, offset=at["actions"])
        found = self._transport.infer(Call("hop", "1", (given,), (wanted,), 10_000_000), 10.0)
        data = found["actions"] if self._slot is None else self._slot.get(self._out, 1, at["actions"])
        return _array(self._out, data)


def _array(tensor: Tensor, data: bytes | memoryview) -> NDArray[Any]:
    return np.frombuffer(data, tensor.dtype).reshape(1, *tensor.shape)


def _refused(why: str) -> None:
    raise SystemExit(f"Triton refused shared memory: {why}")


@contextmanager
def _server(args: HopArgs, folder: Path) -> Iterator[dict[str, int]]:
    version = folder / "models" / "hop" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(_MODEL)
    (version.parent / "config.pbtxt").write_text(
        'name: "hop"\nbackend: "python"\nmax_batch_size: 1\n'
        f'input {{ name: "images" data_type: TYPE_UINT8 dims: {list(args.shape)} }}\n'
        'output { name: "actions" data_type: TYPE_FP32 dims: [ 50, 32 ] }\ninstance_group { kind: KIND_CPU }\n'
    )
    ports = dict(zip(("http", "grpc", "metrics"), _free_ports(3), strict=True))
    command = [str(args.server), f"--model-repository={version.parent.parent}", "--allow-gpu-metrics=false"]
    command += [f"--{name}-port={port}" for name, port in ports.items()]
    command += [f"--{name}-address=127.0.0.1" for name in ports]
    command += [f"--backend-config=python,shm-default-byte-size={args.region}", "--pinned-memory-pool-byte-size=0"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--exit-timeout-secs=3"], stdout=log, stderr=log)
    try:
        _wait(process, ports["http"], folder / "log")
        yield ports
    finally:
        process.terminate()
        process.wait(20)


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"Triton did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _inside_ms(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/hop/stats", timeout=10) as reply:
        stats = json.load(reply)["model_stats"][0]["inference_stats"]
    parts = [stats[name] for name in ("queue", "compute_input", "compute_infer", "compute_output")]
    return sum(float(part["ns"]) for part in parts) / 1e6 / max(float(stats["success"]["count"]), 1)


def _summary(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {
        "p50": round(cuts[49], 3),
        "p90": round(cuts[89], 3),
        "p99": round(cuts[98], 3),
        "min": round(min(values), 3),
    }


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


if __name__ == "__main__":
    raise SystemExit(main())
