"""What the service records of robots that cannot: read back, replayed, ingested; and what a bad disk does (nothing)."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect

from model_versions import SHIFT, add_version
from recap_client import wire
from recap_client.cli import main as client_main
from recap_client.images import encode_jpeg
from recap_client.policy import Chunk, RemotePolicy
from recap_client.record import EpisodeInfo, Outcome, Recorder, StepRecord
from recap_client.robots.base import Observation
from recap_client.rollout import messages, read_rollout
from repository_factory import CHUNK, TASKS, build_repository
from served_requests import HZ, SPEC, drive, files, recording, request
from service_harness import NativeClient, act, critic_server, eventually, observation, policy_server
from services.common.settings import Recording
from services.policy.recorded import Ended
from services.policy.recording import RecordingError, ServiceRecorder


def replay(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = client_main(["replay", *arguments])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_episode_is_one_file_with_all_that_was_served(models: Path, tmp_path: Path) -> None:
    with policy_server(models, record=recording(tmp_path)) as served:
        replies = drive(served.url(), 5)
        assert len(eventually(lambda: files(tmp_path))) == 1
        hash_ = served.engine.hash
    rollout = read_rollout(files(tmp_path)[0])
    assert (rollout.source, rollout.complete, rollout.success, rollout.reason) == ("service", True, True, "success")
    assert (rollout.task, rollout.episode, rollout.steps, rollout.spec) == (TASKS[1], "e1", 5, SPEC)
    assert rollout.policy == {"name": "policy", "version": "1", "hash": hash_}
    assert np.isnan(rollout.action).all() and not rollout.intervention.any()  # it does not know, and says so
    np.testing.assert_array_equal(rollout.proposed, [reply["actions"][0] for reply in replies])
    np.testing.assert_allclose(rollout.t, 100 + np.arange(5) / HZ)
    for step in range(5):
        seen = observation(SPEC, seed=step)
        np.testing.assert_array_equal(rollout.state[step], seen["state"])
        for camera in SPEC.camera_names:
            np.testing.assert_array_equal(rollout.images[camera][step], seen["images"][camera])
    steps = [message for topic, _, message in messages(files(tmp_path)[0]) if topic == "/step"]
    np.testing.assert_array_equal([step["actions"] for step in steps], [reply["actions"] for reply in replies])
    assert all(step["timing"]["total_ms"] > 0 and step["lossy"] is False for step in steps)


def test_jpeg_stays_as_it_came(models: Path, tmp_path: Path) -> None:
    with policy_server(models, record=recording(tmp_path)) as served:
        drive(served.url(), 1, jpeg=True)
    frames = {t: m for t, _, m in messages(files(tmp_path)[0]) if t.startswith("/camera/")}
    want = encode_jpeg(observation(SPEC, seed=0)["images"]["front"])
    assert base64.b64decode(frames["/camera/front"]["data"]) == want


def test_a_replay_of_the_same_model_gives_the_same_actions_and_of_another_its_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = build_repository(tmp_path / "models", models=("policy",))
    with policy_server(models, record=recording(tmp_path / "kept")) as served:
        drive(served.url(), 4)  # no seed of its own: the service's is in the recording
        drive(served.url(), 3, episode="e2", jpeg=True, seed=9)
    with policy_server(models) as served:
        for file in files(tmp_path / "kept"):
            code, said = replay(str(file), "--url", served.url(), "--tolerance", "0", capsys=capsys)
            assert code == 0 and said["max_abs"] == said["mean_abs"] == 0.0 and said["within"]
            assert said["requests"] in (3, 4) and said["actions"] == said["requests"] * CHUNK
            assert said["recorded_model"] == said["served_model"]
    add_version(models, 2, shift=SHIFT)
    with policy_server(models) as served:
        code, said = replay(str(files(tmp_path / "kept")[0]), "--url", served.url(), capsys=capsys)
        assert code == 1 and not said["within"] and said["served_model"]["version"] == "2"
        assert said["max_abs"] == pytest.approx(SHIFT, rel=1e-3) and set(said["by_dimension"]) == {
            "dx",
            "dy",
            "dz",
            "grip",
        }


@pytest.mark.parametrize("late", [0, 2])
def test_a_robots_own_recording_replays_too(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], late: int
) -> None:
    """late: control steps that each reply takes; the log does not say which frame a chunk was asked with."""
    path = tmp_path / "e.mcap"
    with policy_server(models) as served:
        policy = RemotePolicy(served.url(), SPEC)
        policy.reset("e1", TASKS[0], seed=3)
        recorder = Recorder(path, EpisodeInfo(SPEC, TASKS[0], "t", 3, "e1", policy=policy.identity))
        asked: tuple[int, Chunk] | None = None
        due: tuple[int, Chunk] | None = None
        for step in range(12):
            seen = observation(SPEC, seed=step)
            if step % 4 == 0:
                asked = step, policy.infer(Observation(seen["images"], seen["state"], float(step)), TASKS[0])
            if asked is not None and step == asked[0] + late:
                due = asked
            proposed, number = (None, -1) if due is None else (due[1].actions[step - due[0]], due[1].seq)
            applied = np.zeros(4, np.float32)
            recorder.step(StepRecord(step, float(step), seen["state"], applied, seen["images"], proposed, number))
        policy.close()
        assert recorder.close(Outcome(True, 12, "success")) is None
        code, said = replay(str(path), "--url", served.url(), "--tolerance", "1e-6", capsys=capsys)
        assert (code, said["requests"], said["actions"]) == (0, 3, 12 - late) and said["max_abs"] <= 1e-6


def test_openpi_clients_are_recorded_by_connection(models: Path, tmp_path: Path) -> None:
    with policy_server(models, record=recording(tmp_path)) as served:
        for _ in range(2):
            with connect(served.url(), max_size=None) as socket:
                socket.recv()
                seen = observation(SPEC)
                for _ in range(3):
                    socket.send(wire.pack({**seen["images"], "images": seen["images"], **seen}))
                    assert "actions" in wire.unpack(socket.recv())
        eventually(lambda: len(files(tmp_path)) == 2)
    rollouts = [read_rollout(file) for file in files(tmp_path)]
    assert [(r.steps, r.success, r.reason) for r in rollouts] == [(3, None, "disconnected")] * 2


def test_values_of_the_critic_stand_beside_what_they_judge(models: Path, tmp_path: Path) -> None:
    with critic_server(models) as critic:
        url = critic.url("/value")
        with policy_server(models, record=recording(tmp_path), critic_url=url, critic_hz=1000.0) as served:
            eventually(lambda: served.service.tap.connected)
            with NativeClient(served.url()) as client:
                for step in range(3):
                    state = np.full(4, -0.2 * (step + 1), np.float32)
                    client.ask(act(SPEC, step, observation=observation(SPEC, state=state)))
                    eventually(
                        lambda step=step: critic.service.metrics.value.labels("r1")._value.get() < -0.2 * (step + 1)
                    )
                    eventually(lambda: not served.service.tap._under_way)
    values = read_rollout(files(tmp_path)[0]).value
    dim = 0.1 * np.mean([observation(SPEC)["images"][camera].mean() for camera in SPEC.camera_names]) / 255
    np.testing.assert_allclose(values, [-0.2 - dim, -0.4 - dim, -0.6 - dim], atol=5e-3)


def test_a_full_queue_drops_whole_requests_and_counts_them(tmp_path: Path) -> None:
    counted, gate = Counter[str](), threading.Event()
    recorder = ServiceRecorder(
        recording(tmp_path, queue_bytes=2 * request(1).size), SPEC, lambda result: counted.update([result])
    )
    write = recorder._files.served
    recorder._files.served = lambda item: gate.wait(20) and write(item)  # a disk that stands still
    for _ in range(5):
        recorder.served(request(1))
    gate.set()
    recorder.close()
    assert counted == {"written": 2, "dropped": 3}
    assert read_rollout(files(tmp_path)[0]).steps == 2


def test_a_dead_writer_is_counted_and_no_request_fails_for_it(models: Path, tmp_path: Path) -> None:
    with policy_server(models, record=recording(tmp_path)) as served:
        recorder = served.service.recorder
        recorder.close()  # its thread is gone
        assert {reply["type"] for reply in drive(served.url(), 3)} == {"chunk"}
        assert served.service.metrics.record_frames.labels("failed")._value.get() == 3
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match=r"cannot record into this folder .*choose another with --record"):
        ServiceRecorder(Recording(tmp_path / "file" / "x"), SPEC)
    with pytest.raises(RecordingError, match=r"GiB free to record, got .*; make room, or lower --record-min-free"):
        ServiceRecorder(Recording(tmp_path, min_free=2**60), SPEC)


def test_names_of_robots_are_no_paths(tmp_path: Path) -> None:
    recorder = ServiceRecorder(recording(tmp_path / "in"), SPEC)
    recorder.served(request(1, robot="../../out", episode="/etc/passwd\0"))
    recorder.ended(Ended(1, None, "x"))
    recorder.close()
    assert len(files(tmp_path)) == len(files(tmp_path / "in")) == 1
    assert read_rollout(files(tmp_path)[0]).episode == "/etc/passwd\0"


def test_silence_ends_an_episode(tmp_path: Path) -> None:
    recorder = ServiceRecorder(recording(tmp_path, gap_s=0.1), SPEC)
    recorder.served(request(1))
    assert read_rollout(eventually(lambda: files(tmp_path))[0]).reason == "silent"
    recorder.close()


FULL = """
import resource, sys
from pathlib import Path
from collections import Counter
import services.policy.recording_files as files
from services.policy.recording import ServiceRecorder
from served_requests import SPEC, recording, request
files._RETRY_S = float(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
counted = Counter()
recorder = ServiceRecorder(recording(Path(sys.argv[1])), SPEC, lambda result: counted.update([result]))
import time
for n in range(400):
    recorder.served(request(1, seed=n))
    time.sleep(0.002)
recorder.close()
print(counted["written"], counted["failed"], sum(counted.values()))
"""


def test_a_full_disk_is_a_count_and_a_log_line(tmp_path: Path) -> None:
    """Real write errors: the kernel refuses to let files grow."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), "200000", "0.1"], capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written, failed, total = map(int, done.stdout.splitlines()[-1].split())
    assert total == 400 and written > 50 and failed >= 1
    assert "recording failed; what was written stays readable" in done.stdout + done.stderr
    parts = sorted(tmp_path.rglob("*.part"))
    assert len(parts) >= 1 and all(read_rollout(part).steps > 0 for part in parts[:1])  # up to the last full MCAP chunk
