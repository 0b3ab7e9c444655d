"""`recap demo` as a user runs it: real services, the simulated arm in real time, small models that cannot succeed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import repository_factory
from recap_client.record import read_rollout
from recap_client.robots.metaworld import metaworld_spec


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models for the simulated arm's own spec."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repository_factory, "robot_spec", lambda *_, **__: metaworld_spec())
        return repository_factory.build_repository(tmp_path_factory.mktemp("models"))


def command(models: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "recap_model.cli", "demo", "--models", str(models), "--out", str(out), *more]


def services_left(out: Path) -> list[str]:
    """Command lines of processes that still mention the port of this demo's critic."""
    log = (out / "services.log").read_text()
    port = next(line.split("//")[1].rstrip("/").rpartition(":")[2] for line in log.splitlines() if "dashboard" in line)
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if port in text and "serve" in text:
            found.append(text)
    return found


def test_demo_leaves_report_video_rollouts_and_ends_with_json(models: Path, tmp_path: Path) -> None:
    tasks = ("--tasks", "drawer-open", "door-open", "button-press-topdown")
    argv = command(models, tmp_path, "--episodes", "3", "--drills", "1", *tasks)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["episodes"] == 3
    # Not a timing law: a control rate that is right on average even when this machine is busy.
    assert 0 < line["control_hz"] <= 20.5
    assert line["act_p50_ms"] > 0
    data = json.loads((tmp_path / "demo.json").read_text())
    assert data["settings"]["complete"] is True
    assert data["summary"] == {**line, **{k: data["summary"][k] for k in line if isinstance(line[k], float)}}
    rollouts = sorted((tmp_path / "rollouts").iterdir())
    assert [path.suffix for path in rollouts] == [".mcap"] * 4
    for path in rollouts:
        rollout = read_rollout(path)
        assert rollout.complete
        assert rollout.policy is not None
        assert {name: frames.shape[0] for name, frames in rollout.images.items()} == dict.fromkeys(
            ("front", "top"), rollout.steps
        )
    prompts = {read_rollout(path, images=False).task for path in rollouts}
    assert prompts == {"open the drawer", "open the door", "press the button from above"}
    assert all(len(item["values"]) > 3 for item in data["episodes"])  # they streamed while the arm moved
    page = (tmp_path / "report.html").read_text()
    assert "<video" in page
    assert page.count("<img") >= 6
    assert (tmp_path / "video.mp4").stat().st_size > 10_000
    assert services_left(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_keeps_what_is_recorded_and_stops_its_children(
    models: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        command(models, tmp_path, "--tasks", "door-open", "--drills", "0"), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    limit = time.monotonic() + 200  # a busy machine takes its time; only a hang must end
    while not (tmp_path / "rollouts/door-open-300001.mcap.part").exists():  # the first is over, the second runs
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.1)
    time.sleep(0.3)  # the end of the first is on its way from the robot's process
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    files = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert files == ["door-open-300000.mcap", "door-open-300001.mcap"]
    assert read_rollout(tmp_path / "rollouts" / files[1]).reason == "operator"
    data = json.loads((tmp_path / "demo.json").read_text())
    assert data["settings"]["complete"] is False
    assert data["summary"]["episodes"] == 1
    assert services_left(tmp_path) == []


def test_services_that_do_not_start_are_explained(models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "models"
    subprocess.run(["cp", "-r", str(models), str(broken)], check=True)
    next((broken / "critic").glob("*/model.onnx")).write_bytes(b"not a model")
    done = subprocess.run(command(broken, tmp_path / "out"), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "the services ended with exit code" in done.stderr
    assert "services.log" in done.stderr
    assert "Traceback" not in done.stderr
