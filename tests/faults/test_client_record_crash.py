"""A recorder killed or out of disk in the middle of an episode: real processes, real signals, real limits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from recap_client.record import read_rollout

WRITER = """
import sys, time, resource
import numpy as np
from pathlib import Path
from recap_client.record import EpisodeInfo, Outcome, Recorder, StepRecord
from recap_client.robots.metaworld import metaworld_spec
path, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
recorder = Recorder(path, EpisodeInfo(metaworld_spec(), "open the door", "door-open", 1, "e1"))
rng = np.random.default_rng(0)
steps = 0
while True:
    images = {name: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in ("front", "top")}
    recorder.step(StepRecord(steps, float(steps), np.full(4, steps, np.float32), np.zeros(4, np.float32), images))
    steps += 1
    time.sleep(0.01)
    if limit and steps == 150:
        break
    print(steps, flush=True)
error = recorder.close(Outcome(True, steps, "success"))
print("ERROR", error)
"""


def start(path: Path, limit: int = 0) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(limit)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_kill_9_leaves_all_but_the_last_moment(tmp_path: Path) -> None:
    path = tmp_path / "e.mcap"
    process = start(path)
    assert process.stdout is not None
    sent = int(process.stdout.readline())
    began = time.monotonic()  # after the imports
    while time.monotonic() - began < 2.0:
        sent = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    rest = process.stdout.read().split()  # what it said before it died and we had not read yet
    sent = int(rest[-1]) if rest else sent
    assert not path.exists()
    rollout = read_rollout(path.with_name("e.mcap.part"))
    assert not rollout.complete and rollout.success is None
    # flushed every half second: at 100 steps/s at most the last second may be missing, more on a machine that stalls
    assert 0 < rollout.steps <= sent + 1 and sent - rollout.steps <= sent / 2 + 110
    assert (rollout.state[:, 0] == range(rollout.steps)).all()
    assert rollout.images["front"].shape == (rollout.steps, 64, 64, 3)


def test_a_full_disk_is_reported_and_the_loop_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "e.mcap"
    process = start(path, limit=1_000_000)
    out, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert "149" in out.split() and "ERROR" in out, "the loop must reach its end"
    assert "e.mcap.part: writing the rollout log failed" in out and "File too large" in out
    assert "goes on unrecorded" in log  # said at once, not only at the end
    rollout = read_rollout(path.with_name("e.mcap.part"))
    assert 0 < rollout.steps < 150 and not rollout.complete
