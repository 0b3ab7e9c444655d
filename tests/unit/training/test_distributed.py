"""Several processes are one run: real ones, started by torchrun, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from recap_model import cli
from recap_model.manifest import verify
from trained import make_data
from training import distributed
from training.dataset import open_dataset
from training.labels import read_values

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("distributed"))


@contextmanager
def two(*argv):
    """`recap ...` in two processes that find each other through torchrun; they end with the block."""
    process = subprocess.Popen(
        [*LAUNCH, "recap_model.cli", *map(str, argv)], cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()  # the launcher ends its workers; after its end this does nothing
        process.wait(60)


def finish(process, code=0):
    out, _ = process.communicate(timeout=270)
    assert (process.returncode == 0) == (code == 0), out
    return out


def losses(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def command(data, kind, out, *more):
    base = ["train", kind, "--dataset", data / "dataset", "--preset", "debug", "--precision", "fp32", "--device", "cpu"]
    critic = ["--returns", data / "returns", "--values-out", Path(f"{out}-values")]
    rest = critic if kind == "critic" else ["--mode", "imitation"]
    return [str(part) for part in (*base, *rest, "--out", out, *more)]


@pytest.mark.slow
def test_two_processes_train_the_policy_that_one_trains(data, tmp_path):
    size = ("--steps", "10", "--batch-size", "9", "--accumulate", "2")  # 4 and 5 rows a process
    with two(*command(data, "policy", tmp_path / "two", *size)) as process:
        said = finish(process)
    assert cli.main(command(data, "policy", tmp_path / "one", *size)) == 0
    one, both = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [line["step"] for line in both] == [line["step"] for line in one] == [5, 10]
    for name in ("loss", "grad_norm", "lr"):
        np.testing.assert_allclose([x[name] for x in both], [x[name] for x in one], rtol=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name in weights[0].keys() - {"vision.convs.0.bias"}:  # without effect: its gradient is rounding alone
        np.testing.assert_allclose(weights[1][name], weights[0][name], rtol=1e-4, atol=1e-5)
    verify(tmp_path / "two", "policy")
    assert said.count(f"{tmp_path / 'two'}: policy") == 1 and said.count("epochs") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "one.work", "two", "two.work"]
    assert [p.name for p in (tmp_path / "two.work").iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_a_stopped_critic_saves_once_and_another_number_of_processes_finishes_it(data, tmp_path):
    """SIGTERM to the launcher, as a scheduler sends it; the rest is done by one process."""
    out = tmp_path / "critic"
    argv = command(data, "critic", out, "--steps", "300", "--batch-size", "8", "--save-every", "1000")
    work, until = tmp_path / "critic.work" / "all", time.monotonic() + 200
    with two(*argv) as process:
        while not (work / "metrics.jsonl").is_file() or not losses(work):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said = finish(process, code=1)
    assert said.count("run the same command again to resume") == 1, said
    assert (work / "state.safetensors").is_file() and not out.exists()
    before = losses(work)
    assert cli.main(argv) == 0
    after = losses(out)
    assert after[: len(before)] == before and [line["step"] for line in after] == list(range(5, 301, 5))
    values = read_values(tmp_path / "critic-values", open_dataset(data / "dataset"))
    assert np.isfinite(values.values).all() and after[-1]["loss"] < after[0]["loss"]


@given(st.integers(2, 64), st.integers(0, 63))
def test_who_is_who_comes_from_the_launcher(count, rank):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(count))
        patch.setenv("RANK", str(rank))
        patch.setenv("LOCAL_RANK", str(rank % 8))
        if rank >= count:
            with pytest.raises(distributed.DistributedError, match=f"RANK below WORLD_SIZE={count}, got RANK={rank}"):
                distributed.processes()
            return
        own = distributed.processes()
        assert (own.rank, own.count, own.local, own.main) == (rank, count, rank % 8, rank == 0)


def test_a_launchers_nonsense_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(distributed.DistributedError, match="expected whole numbers from the launcher, got WORLD_S"):
        distributed.processes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.processes() == distributed.Processes()


@pytest.mark.parametrize(("name", "what"), [("FSDP", "fully sharded"), ("DEEPSPEED", "DeepSpeed")])
def test_sharded_models_are_refused_with_the_way_out(monkeypatch, name, what):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    distributed.accelerator.cache_clear()
    with pytest.raises(distributed.DistributedError, match=f"got a {what} configuration; launch with `acc"):
        distributed.accelerator(True)


def test_a_single_process_never_loads_accelerate():
    code = (
        "import sys, torch, training.policy, training.critic; from training.distributed import replicate;"
        "r = replicate(torch.nn.Linear(1, 1), lambda *_: 3);"
        "assert r.loss() == 3 and r.total(2) == 2; assert 'accelerate' not in sys.modules"
    )
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
