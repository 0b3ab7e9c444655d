"""`recap bench serve`: the run of seconds end to end, that it leaves nothing behind, and its parts."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.page import append
from benchmarks.serve import peers, report
from benchmarks.serve.engines import NullEngine, TinyEngine
from benchmarks.serve.payloads import PAYLOADS
from benchmarks.serve.plan import unmeasured
from benchmarks.serve.processes import child, cpu_seconds, spent, stop, tree
from benchmarks.serve.search import most
from benchmarks.serve.standalone import sample
from recap_client import wire
from recap_client.images import JpegImage, decode_jpeg
from repository_factory import build_repository
from service_harness import eventually

COMMAND = [sys.executable, "-m", "recap_model.cli", "bench", "serve"]


@pytest.mark.slow
def test_null_service_and_echo_end_to_end(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("# Benchmarks\n\nAn introduction.\n\n## old\n")
    done = subprocess.run([*COMMAND, "--quick", "--append", str(page)], capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"hardware", "busy", "added", "rows"}
    assert {(row["server"], row["payload"], row["hz"]) for row in result["rows"]} == {
        (server, "2x224", hz) for server in ("echo", "recap-null") for hz in (None, 30)
    }
    for row in result["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] and 0 < row["cpu_s_per_request"] < 1
        assert row["misses"] is None if row["hz"] is None else 0 <= row["misses"] <= 1
        assert row["hz"] is None or row["robots"] == 0 or row["misses"] <= 0.01
    added = result["added"]
    assert added["ratio_p50"] == pytest.approx(added["p50_ms"] / added["echo_p50_ms"], abs=1e-3)
    text = page.read_text()
    assert text.index("An introduction.") < text.index("servers side by side") < text.index("## old")
    assert text.count("| recap-null | 2x224 |") == 1


def test_interrupted_it_leaves_no_server_behind() -> None:
    command = subprocess.Popen([*COMMAND, "--quick"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert command.stderr is not None
    while "in turns" not in command.stderr.readline():
        assert command.poll() is None
    limit = time.monotonic() + 300
    while len(family := tree(command.pid)) < 3 and time.monotonic() < limit:
        time.sleep(0.02)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=300)
    assert command.returncode == 130 and "interrupted" in said
    assert len(family) >= 3
    # the last of them may be dead and not yet buried by the process that inherits it
    eventually(lambda: not [pid for pid in family if os.path.exists(f"/proc/{pid}")])


@pytest.mark.parametrize("script", ["trap '' TERM; sleep 600 & while :; do wait; done", "sleep 600 & kill -9 $$"])
def test_what_ignores_sigterm_and_what_lost_its_parent_ends(script: str, tmp_path: Path) -> None:
    marker = tmp_path / "child"
    with child(
        ["bash", "-c", script.replace("&", f"& echo $! > {marker};", 1)], tmp_path / "log", os.environ, tmp_path
    ) as process:
        limit = time.monotonic() + 60
        while not (marker.is_file() and marker.read_text().endswith("\n")) and time.monotonic() < limit:
            time.sleep(0.01)
        stop(process, 0.1)
    assert process.returncode == -signal.SIGKILL
    assert ended(int(marker.read_text()))


def ended(pid: int) -> bool:
    """Gone, or dead and only not yet collected by whoever adopted it."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


REFUSAL = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\noops"


@pytest.mark.parametrize(
    "reply, said", [(b"", "the server closed the connection"), (REFUSAL, "500 Internal Server Error: b'oops'")]
)
def test_a_server_that_hangs_up_or_refuses_answers_no_deadline(reply: bytes, said: str, tmp_path: Path) -> None:
    sample.save(PAYLOADS["state"].sample(), tmp_path / "state.npz")
    job = {"payload": str(tmp_path / "state.npz"), "seconds": 0.3}
    jobs = [{**job, "mode": "closed", "requests": 9, "warm_up": 0}, {**job, "mode": "open", "robots": 2, "hz": 10}]
    script = str(Path(sample.__file__).with_name("robots.py"))
    with answering(reply) as port:
        lines = "".join(json.dumps(job) + "\n" for job in jobs)
        command = [sys.executable, script, "ray", str(port), str(tmp_path)]
        done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300)
    closed, opened = (json.loads(line) for line in done.stdout.splitlines())
    assert closed["error"].startswith("LinkError: ") and said in closed["error"]
    assert opened["latencies_ms"] == [] and opened["asked"] == opened["missed"] == 6


@contextmanager
def answering(reply: bytes) -> Iterator[int]:
    """A port where every connection gets `reply` to its first bytes, and an end."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    with server.accept()[0] as connection:
                        connection.recv(1 << 16)
                        connection.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(30)


def test_cpu_of_a_process_tree() -> None:
    before = cpu_seconds(os.getpid())
    start = time.process_time()
    while time.process_time() - start < 0.05:
        pass
    assert 0.05 <= spent(before, cpu_seconds(os.getpid())) < 5
    assert spent({1: 2.0, 9: 7.0}, {1: 2.5, 3: 1.0}) == 1.5


@given(st.integers(0, 300), st.integers(1, 300), st.integers(1, 256))
def test_the_search_finds_the_limit_to_an_eighth(truth: int, start: int, limit: int) -> None:
    tried: list[int] = []

    def holds(count: int) -> bool:
        tried.append(count)
        return count <= truth

    found = most(holds, start=start, limit=limit)
    want = min(truth, limit)
    assert found <= want <= found + max(found // 8, 0)
    assert found == 0 or found in tried
    assert len(tried) == len(set(tried)) <= 20 and all(1 <= count <= limit for count in tried)


@pytest.mark.parametrize("name", ["state", "2x224", "3x224-jpeg"])
def test_a_payload_survives_its_file_and_its_message(name: str, tmp_path: Path) -> None:
    payload = PAYLOADS[name]
    sent = payload.sample()
    sample.save(sent, tmp_path / "x.npz")
    back = sample.load(tmp_path / "x.npz")
    assert sample.message(back) == sample.message(sent) == sample.message(payload.sample())
    seen = wire.unpack(sample.message(sent))
    read = sample.decode(sample.message(sent))
    np.testing.assert_array_equal(seen["state"], read["state"])
    for camera in payload.robot.cameras:
        frame = seen["images"][camera.name]
        assert isinstance(frame, JpegImage) == payload.jpeg
        pixels = decode_jpeg(frame.data) if isinstance(frame, JpegImage) else frame
        np.testing.assert_array_equal(pixels, read["images"][camera.name])
        assert pixels.shape == (camera.height, camera.width, 3)


def test_actions_are_encoded_as_ours_are() -> None:
    actions = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert sample.encode({"actions": actions}) == wire.pack({"actions": actions})


def test_the_engines_answer_what_the_pipeline_asks(tmp_path: Path) -> None:
    models = build_repository(tmp_path, models=("policy",))
    payload = PAYLOADS["2x224"]
    for engine in (NullEngine(payload), TinyEngine(payload, models)):
        frames = np.stack([payload.sample().images[name] for name in payload.robot.camera_names])
        one = {name: np.zeros(shape, np.float32) for name, shape in engine.input_shapes.items()}
        one["images"], one["state"] = frames, payload.sample().state
        actions = engine.run({name: np.stack([value, value]) for name, value in one.items()})["actions"]
        assert actions.shape == (2, sample.CHUNK, sample.ACTIONS) and actions.dtype == np.float32
        assert np.isfinite(actions).all() and actions.any() == (engine.name == "tiny")
        engine.close()


def test_a_peer_that_cannot_be_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(peers.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(peers.PeerMissing, match="needs `uv`"):
        peers.install(peers.PEERS["ray"], tmp_path)
    (tmp_path / "uv").write_text("#!/bin/sh\necho no such package >&2; exit 3\n")
    (tmp_path / "uv").chmod(0o755)
    with pytest.raises(peers.PeerMissing, match=r"`venv --quiet` ended with 3: no such package"):
        peers.install(peers.PEERS["ray"], tmp_path)


def test_a_row_that_could_not_be_had_says_so() -> None:
    rows = [unmeasured("ray", "2x224", "no | network"), unmeasured("lerobot", "state", "x")]
    text = report.table(rows, None, "a machine", 0.5, (50, 10))
    line = next(line for line in text.splitlines() if line.startswith("| ray |"))
    head = next(line for line in text.splitlines() if line.startswith("| server |"))
    assert "not measured: no / network" in line and line.count("|") == head.count("|")
    assert "held at 10 Hz | held at 50 Hz" in head and "50% of the machine was busy" in text


def test_a_table_goes_on_top_of_the_older_ones(tmp_path: Path) -> None:
    page = tmp_path / "x.md"
    append(page, "## one\n")
    append(page, "## two\n")
    assert page.read_text() == "# Benchmarks\n\n## two\n\n## one\n"
