"""The emergency stop: a latch, its triggers, and what the loop does with it."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recap_client import verdict
from recap_client.emergency import EmergencyStop, EmergencyStopped, armed, check, file_source, halt, signals
from recap_client.policy import RemotePolicy
from recap_client.robots.base import StepResult
from recap_client.rollout import read_rollout
from recap_client.runtime import LoopSettings, run_episode
from scripted_service import ScriptedService
from toy_robot import ToyHuman, ToyRobot

Process = subprocess.Popen[bytes]
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


@contextlib.contextmanager
def on_a_terminal(url: str, folder: Path, *, episodes: int, limit: int) -> Iterator[tuple[Process, int]]:
    """`recap-client run` on a pseudo terminal, whose keys are what is written to the number."""
    import termios

    command = [sys.executable, "-m", "recap_client.cli", "run", "--robot", "toy_robot:ToyRobot", "--task", "right",
               "--robot-options", f'{{"limit": {limit}, "hz": 50}}', "--url", url, "--episodes", str(episodes),
               "--record", str(folder), "--images", "jpeg"]  # fmt: skip
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    # its own session, whose controlling terminal the pseudo terminal becomes
    code = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    code += f"os.execv(sys.executable, {command!r})"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment, start_new_session=True)  # fmt: skip
    try:
        yield process, ours
        assert termios.tcgetattr(theirs) == before, "it is left as it was"
    finally:
        process.kill()
        process.communicate()
        os.close(ours)
        os.close(theirs)


def still(_: object) -> np.ndarray:
    return np.zeros((8, 1), np.float32)


def test_the_keys_of_the_terminal_stop_and_reset(tmp_path: Path) -> None:
    """Space stops, the run waits, r goes on, the last line is the summary."""
    with (
        ScriptedService(ToyRobot(hz=50.0).spec, act=still) as service,
        on_a_terminal(service.url, tmp_path, episodes=2, limit=100) as (process, keys),
    ):
        assert process.stderr is not None and process.stdout is not None
        assert b"emergency stop: Space or Enter, kill -USR1" in _until(process.stderr, b"\n")
        _wait(lambda: len(service.of_type("act")) >= 1)
        os.write(keys, b" ")
        assert b"STOPPED (key pressed)" in _until(process.stderr, b"Ctrl-C.")
        asked = len(service.received)
        time.sleep(0.3)
        assert len(service.received) == asked and process.poll() is None, "it waits, and asks for nothing"
        os.write(keys, b"r")
        out, _ = process.communicate(timeout=60)
    lines = out.decode().splitlines()
    assert "stopped after" in lines[0] and "failed  after 100 steps" in lines[1] and process.returncode == 0
    assert read_rollout(tmp_path / "right-000000.mcap").reason == "stopped"


def test_the_keys_of_the_terminal_end_episodes_with_an_outcome(tmp_path: Path) -> None:
    """Success, failure, not worth keeping: each ends the running episode and no other, and is told to the service."""
    with (
        ScriptedService(ToyRobot(hz=50.0).spec, act=still) as service,
        on_a_terminal(service.url, tmp_path, episodes=3, limit=100_000) as (process, keys),
    ):
        assert process.stderr is not None
        told = _until(process.stderr, b"set aside)")
        assert b"end the episode: s = success, f = failure, d = discard" in told
        for number, key in enumerate((b"s", b"xF", b"d"), 1):  # what is no key means nothing
            _wait(lambda n=number: len(service.of_type("reset")) == n)  # type: ignore[misc]
            before = len(service.of_type("act"))
            _wait(lambda n=before: len(service.of_type("act")) > n)  # type: ignore[misc]
            os.write(keys, key)
        out, _ = process.communicate(timeout=60)
    lines = out.decode().splitlines()
    assert "seed 0: success after" in lines[0] and "seed 1: failed  after" in lines[1]
    assert "seed 2: discarded, the same command asks for it again, after" in lines[2]
    summary = json.loads(lines[-1])
    assert (summary["episodes"], summary["success_rate"], summary["discarded"], process.returncode) == (2, 0.5, 1, 0)
    assert [message["success"] for message in service.of_type("outcome")] == [True, False]
    kept = [read_rollout(path) for path in sorted(tmp_path.glob("*.mcap"))]
    assert [(rollout.success, rollout.reason) for rollout in kept] == [(True, "success"), (False, "failure")]
    aside = read_rollout(tmp_path / "right-000002.mcap.discarded")
    assert (aside.success, aside.reason, aside.complete) == (None, "discarded", True)


def test_a_word_said_before_an_episode_is_not_about_it() -> None:
    verdict.say("discarded")
    done = run_episode(ToyRobot(), "right", 0, teleoperator=ToyHuman, settings=LoopSettings(realtime=False))
    assert (done.reason, done.success) == ("success", True)


def test_the_operator_knows_better_than_the_robot_and_it_holds() -> None:
    class Seen(ToyRobot):
        def act(self, action: np.ndarray) -> StepResult:
            result = super().act(action)
            if result.done:
                verdict.say("failure")
            return result

    robot = Seen()
    done = run_episode(robot, "right", 0, teleoperator=ToyHuman, settings=LoopSettings(realtime=False))
    assert (done.reason, done.success) == ("failure", False) and robot.log[-1] is None


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
