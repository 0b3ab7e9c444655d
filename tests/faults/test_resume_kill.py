"""Training that is killed, at any step or half-way through writing its state, ends at the bytes of a straight run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from recap_model.manifest import verify
from trained import make_data

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30

# Imports once and forks a real process for every run: {"argv": [...], "limit": bytes a file may have, or null}.
# Says the pid, then how the process ended. A file that outgrows the limit ends it in the middle of the write.
SERVER = """
import json, os, resource, signal, sys
import pandas, torch._dynamo, training.cli, training.critic, training.policy
from recap_model import cli
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.nice(5)  # whoever watches for the moment to kill must not come too late
        sys.stdin.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if order["limit"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
        os._exit(cli.main(order["argv"]))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Server:
    """Starts runs and says how they ended: 0, or minus the signal."""

    def __init__(self, process: "subprocess.Popen[str]", said: Path) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.said = said
        self._in, self._out = process.stdin, process.stdout

    def start(self, argv: list[str], limit: int | None = None) -> int:
        self._in.write(json.dumps({"argv": argv, "limit": limit}) + "\n")
        self._in.flush()
        return int(self._out.readline())

    def ended(self) -> int:
        return int(self._out.readline())


@contextmanager
def forking(said: Path) -> Iterator[Server]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(said)], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Server(process, said)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with forking(tmp_path_factory.mktemp("server") / "stderr") as made:
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("killed"))


def command(data: Path, kind: str, folder: Path) -> list[str]:
    base = ["train", kind, "--dataset", data / "dataset", "--out", folder / "out", "--preset", "debug"]
    size = ["--steps", STEPS, "--batch-size", 6, "--save-every", 1, "--device", "cpu"]
    critic = ["--returns", data / "returns", "--values-out", folder / "values"]
    rest = critic if kind == "critic" else ["--mode", "imitation", "--accumulate", 2]
    return [str(part) for part in (*base, *size, *rest)]


def saved_step(work: Path) -> int:
    """The step of the state in `work`, 0 before the first."""
    try:
        with safe_open(work / "state.safetensors", "np") as stream:
            return int(stream.metadata()["step"])
    except (FileNotFoundError, SafetensorError):
        return 0


def kill_at(server: Server, argv: list[str], work: Path, step: int, delay: float | None) -> None:
    """Start a run and kill -9 it `delay` seconds after it has saved `step`; None: when it begins to write the next."""
    pid = server.start(argv)
    until = time.monotonic() + 120
    while saved_step(work) < step:
        assert time.monotonic() < until, f"step {saved_step(work)} of {step}"
        time.sleep(0.001)
    while delay is None and not leftovers(work):
        assert time.monotonic() < until
    time.sleep(delay or 0.0)
    os.kill(pid, signal.SIGKILL)
    assert server.ended() == -signal.SIGKILL
    assert saved_step(work) >= step


def leftovers(work: Path) -> list[str]:
    return [name for name in os.listdir(work) if name == "state.tmp" or name.startswith(".tmp")]


@pytest.fixture(scope="module")
def straight(server: Server, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """kind -> folder of a run that nothing disturbed."""
    made = {}
    for kind in ("policy", "critic"):
        made[kind] = tmp_path_factory.mktemp(kind)
        server.start(command(data, kind, made[kind]))
        assert server.ended() == 0
    return made


def files(folder: Path) -> dict[str, Any]:
    names = ("model.safetensors", "metrics.jsonl", "values.parquet")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.name in names}


@pytest.mark.parametrize(("kind", "seed"), [("policy", 1), ("critic", 2)])
def test_a_run_killed_again_and_again_ends_at_the_same_bytes(
    server: Server, data: Path, straight: dict[str, Path], tmp_path: Path, kind: str, seed: int
) -> None:
    broken, rng = tmp_path / "broken", np.random.default_rng(seed)
    argv = command(data, kind, broken)
    work = broken / "out.work" / ("all" if kind == "critic" else "")
    at = np.sort(rng.choice(np.arange(1, STEPS - 12), 2, replace=False))
    for step, delay in zip(at.tolist(), (float(rng.uniform(0, 0.03)), None), strict=True):
        kill_at(server, argv, work, step, delay)
        before, size = saved_step(work), (work / "state.safetensors").stat().st_size
        # the disk has no room for the next state: the one before must survive
        server.start(argv, limit=int(rng.integers(size // 8, size)))
        assert server.ended() == -signal.SIGXFSZ
        assert saved_step(work) == before and leftovers(work)
    (work / "state.tmp").write_bytes((work / "state.safetensors").read_bytes()[: size // 2])  # cut in the middle
    server.start(argv)
    assert server.ended() == 0
    expected, got = files(straight[kind]), files(broken)
    assert expected.keys() == got.keys() and len(got) == (4 if kind == "critic" else 3)
    assert all(got[name] == expected[name] for name in expected), [n for n in expected if got[n] != expected[n]]
    verify(broken / "out", kind)
    assert [p.name for p in work.iterdir()] == ["metrics.jsonl"], "no state and no half of one is left"


def test_a_line_of_the_metrics_that_was_cut_is_written_again(
    server: Server, data: Path, straight: dict[str, Path], tmp_path: Path
) -> None:
    """The kill came while the line after the saved step was written. Other steps are dropped, as they are run again."""
    argv, metrics = command(data, "policy", tmp_path), tmp_path / "out.work" / "metrics.jsonl"
    kill_at(server, argv, metrics.parent, 6, 0.0)
    metrics.write_text(metrics.read_text() + '{"step": 30, "loss": 1.0}\n{"step": 10, "loss": 1.9')
    server.start(argv)
    assert server.ended() == 0
    assert files(tmp_path) == files(straight["policy"])


def test_a_damaged_state_is_refused_with_the_way_out(server: Server, data: Path, tmp_path: Path) -> None:
    argv, work = command(data, "policy", tmp_path), tmp_path / "out.work"
    kill_at(server, argv, work, 3, 0.0)
    state = work / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    server.start(argv)
    assert server.ended() == 2
    said = server.said.read_text()
    assert f"{state}: expected the state of an unfinished run, got a damaged file" in said
    assert "remove it to start over" in said and "Traceback" not in said
