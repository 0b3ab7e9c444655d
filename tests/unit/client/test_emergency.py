"""The emergency stop: a latch, its triggers, and what the loop does with it."""

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recap_client.emergency import EmergencyStop, EmergencyStopped, armed, check, file_source, halt, signals
from recap_client.policy import RemotePolicy
from recap_client.robots.base import StepResult
from recap_client.rollout import read_rollout
from recap_client.runtime import LoopSettings, run_episode
from scripted_service import ScriptedService
from toy_robot import ToyHuman, ToyRobot

ROOT = Path(__file__).resolve().parents[3]


@given(st.lists(st.sampled_from(["trigger", "reset", "on", "off", "poll"]), max_size=30))
def test_it_is_pressed_from_the_first_reason_to_a_reset_that_nothing_forbids(events: list[str]) -> None:
    source: list[str | None] = [None]
    stop = EmergencyStop(lambda: source[0])
    pressed = False
    for event in events:
        if event == "trigger":
            stop.trigger("button")
            pressed = True
        elif event in ("on", "off"):
            source[0] = "bumper" if event == "on" else None
        elif event == "reset":
            assert stop.reset() == (source[0] is None)
            pressed = pressed and source[0] is not None
        pressed = pressed or (event == "poll" and source[0] is not None)
        if event == "poll":
            assert (stop.poll() is not None) == pressed


def test_the_first_reason_is_kept_and_a_broken_source_stops() -> None:
    stop = EmergencyStop()
    for why in ("first", "second"):
        stop.trigger(why)
    assert stop.poll() == "first"

    def broken() -> str | None:
        raise OSError("wire cut")

    blind = EmergencyStop(broken)
    assert blind.poll() == "the source of the emergency stop failed: wire cut" and not blind.reset()


def test_only_the_armed_stop_counts_and_only_within_its_block(tmp_path: Path) -> None:
    stop = EmergencyStop(file_source(tmp_path / "stop"))
    (tmp_path / "stop").touch()
    check()
    with armed(stop):
        with pytest.raises(EmergencyStopped, match=r"the file .*stop exists; nothing moves until the operator resets"):
            check()
        (tmp_path / "stop").unlink()
        with pytest.raises(EmergencyStopped):  # the file is gone, the latch is not
            check()
        assert stop.reset()
        check()
    check()


def test_waiting_for_the_reset() -> None:
    stop = EmergencyStop()
    assert stop.wait_until_reset()
    stop.trigger()
    assert not stop.wait_until_reset(0.02)
    threading.Timer(0.1, stop.reset).start()
    assert stop.wait_until_reset(10)


def test_signals_stop_and_reset_and_are_given_back() -> None:
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGUSR2)
    stop = EmergencyStop()
    with signals(stop):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.poll() == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.poll() is None
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGUSR2)) == before


class Pressing(ToyRobot):
    """Its button is pressed while step `at` is under way; counts what it is told to do afterwards."""

    def __init__(self, stop: EmergencyStop, at: int, **options: float) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.button, self.at = stop, at

    def act(self, action: np.ndarray) -> StepResult:
        if len(self.log) == self.at:
            self.button.trigger("button")
        return super().act(action)


@pytest.mark.parametrize("realtime", [True, False])
def test_an_episode_ends_stopped_held_recorded_and_no_other_begins(tmp_path: Path, realtime: bool) -> None:
    stop = EmergencyStop()
    robot = Pressing(stop, 3, hz=100.0)
    with ScriptedService(robot.spec) as service, armed(stop):
        policy = RemotePolicy(service.url, robot.spec)
        settings = LoopSettings(realtime=realtime)
        result = run_episode(robot, "right", 0, policy=policy, recording=tmp_path / "e.mcap", settings=settings)
        assert (result.reason, result.success, result.steps) == ("stopped", None, len(robot.log) - 1)
        assert [action for action in robot.log if action is not None][4:] == [] and robot.log[-1] is None
        done = list(robot.log)
        with pytest.raises(EmergencyStopped, match="button"):
            run_episode(robot, "right", 1, policy=policy, settings=settings)
        assert robot.log == done and robot.seed == 0, "not even the reset of the robot"
        assert stop.reset()
        robot.at = -1
        again = run_episode(robot, "right", 2, policy=policy, settings=LoopSettings(realtime=False))
        policy.close()
    assert again.success and service.of_type("outcome") == [{**service.of_type("outcome")[0], "success": True}]
    rollout = read_rollout(tmp_path / "e.mcap")
    assert (rollout.reason, rollout.success, rollout.complete, rollout.steps) == ("stopped", None, True, result.steps)


def test_another_thread_stops_a_robot_that_waits_for_its_service() -> None:
    stop, robot = EmergencyStop(), ToyRobot(limit=2000, hz=50.0)
    with ScriptedService(robot.spec, script=lambda _: "late:1") as service, armed(stop):
        policy = RemotePolicy(service.url, robot.spec)
        threading.Timer(0.2, stop.trigger, ["light curtain"]).start()
        result = run_episode(robot, "right", 0, policy=policy)
        policy.close()
    assert result.reason == "stopped" and result.steps < 1000 and set(robot.log) == {None}


def test_a_stop_of_its_own_is_preferred_and_its_failure_falls_back_to_hold(caplog: pytest.LogCaptureFixture) -> None:
    class Braked(ToyRobot):
        stopped = 0

        def stop(self) -> None:
            self.stopped += 1

    class Jammed(ToyRobot):
        def stop(self) -> None:
            raise OSError("no brake")

    braked, jammed = Braked(), Jammed()
    halt(braked)
    halt(jammed)
    assert (braked.stopped, braked.log, jammed.log) == (1, [], [None])
    assert "could not be told to stand still: no brake" in caplog.text


def test_demonstrations_obey_too() -> None:
    stop = EmergencyStop()
    with armed(stop):
        result = run_episode(
            Pressing(stop, 2), "right", 0, teleoperator=ToyHuman, settings=LoopSettings(realtime=False)
        )
    assert (result.reason, result.steps) == ("stopped", 3)


def test_the_keys_of_the_terminal_stop_reset_and_leave_it_as_it_was(tmp_path: Path) -> None:
    """`recap-client run` on a pseudo terminal: Space stops, the run waits, r goes on, the last line is the summary."""
    import termios

    robot = ToyRobot(limit=200, hz=50.0)
    with ScriptedService(robot.spec, act=lambda _: np.zeros((8, 1), np.float32)) as service:
        command = [sys.executable, "-m", "recap_client.cli", "run", "--robot", "toy_robot:ToyRobot", "--task", "right",
                   "--robot-options", '{"limit": 100, "hz": 50}', "--url", service.url, "--episodes", "2",
                   "--record", str(tmp_path), "--images", "jpeg"]  # fmt: skip
        ours, theirs = pty.openpty()
        before = termios.tcgetattr(theirs)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}"}
        # its own session, whose controlling terminal the pseudo terminal becomes
        code = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        code += f"os.execv(sys.executable, {command!r})"
        process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=environment, start_new_session=True)  # fmt: skip
        try:
            assert process.stderr is not None and process.stdout is not None
            assert b"emergency stop: Space or Enter, kill -USR1" in _until(process.stderr, b"\n")
            _wait(lambda: len(service.of_type("act")) >= 1)
            os.write(ours, b" ")
            assert b"STOPPED (key pressed)" in _until(process.stderr, b"Ctrl-C.")
            asked = len(service.received)
            time.sleep(0.3)
            assert len(service.received) == asked and process.poll() is None, "it waits, and asks for nothing"
            os.write(ours, b"r")
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()
        after = termios.tcgetattr(theirs)
        os.close(ours)
        os.close(theirs)
    lines = out.decode().splitlines()
    assert "stopped after" in lines[0] and "failed  after 100 steps" in lines[1] and process.returncode == 0
    assert after == before
    assert read_rollout(tmp_path / "right-000000.mcap").reason == "stopped"


def _until(stream: object, token: bytes, seconds: float = 60.0) -> bytes:
    data, end = b"", time.monotonic() + seconds
    while token not in data and time.monotonic() < end:
        if select.select([stream], [], [], 0.1)[0]:
            piece = os.read(stream.fileno(), 4096)  # type: ignore[attr-defined]
            if not piece:
                break
            data += piece
    return data


def _wait(condition, seconds: float = 60.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
