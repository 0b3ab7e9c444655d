"""Emergency stop: a latch that every control loop of the process obeys until the operator resets it.

This is software. It does not replace a button that cuts the power of the motors.
"""

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from recap_client.robots.base import Robot

POLL_S = 0.05
STOP_KEYS, RESET_KEYS = " \r\n", "r"

_log = logging.getLogger(__name__)


class EmergencyStopped(RuntimeError):
    """The emergency stop is pressed: nothing may be executed until the operator has reset it."""


class EmergencyStop:
    """Pressed once, it stays pressed until `reset`. `trigger` never blocks: call it from any thread or signal handler.

    source: asked at every `poll`, says why to stop or None (a bumper, a light curtain, a file). An exception in it
    counts as a stop. The stop cannot be reset while the source still says so.
    """

    def __init__(self, source: Callable[[], str | None] | None = None) -> None:
        self._source = source
        # a plain attribute: a lock could be held by the very thread that a signal handler interrupts
        self._why: str | None = None

    def trigger(self, why: str = "pressed") -> None:
        """Stop. The first reason is kept."""
        self._why = self._why or why or "pressed"

    def poll(self) -> str | None:
        """Why everything must stand still; None when it may move."""
        said = self._ask()
        if said is not None:
            self.trigger(said)
        return self._why

    def reset(self) -> bool:
        """The operator lets the robot move again. False when the source still says stop."""
        if self._ask() is not None:
            return False
        self._why = None
        return True

    def wait_until_reset(self, timeout_s: float | None = None) -> bool:
        """Block until the stop is reset; False when `timeout_s` passed first."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while self._why is not None:
            if until is not None and time.monotonic() > until:
                return False
            time.sleep(POLL_S)
        return True

    def _ask(self) -> str | None:
        if self._source is None:
            return None
        try:
            return self._source()
        except Exception as error:
            return f"the source of the emergency stop failed: {error}"


_armed: EmergencyStop | None = None
"""Of the process: two buttons would leave the question which one a loop obeys."""


@contextlib.contextmanager
def armed(stop: EmergencyStop) -> Iterator[EmergencyStop]:
    """Within the block, every episode of this process obeys `stop`."""
    global _armed
    before, _armed = _armed, stop
    try:
        yield stop
    finally:
        _armed = before


def check() -> None:
    """Raise EmergencyStopped when the armed stop is pressed; nothing when none is armed."""
    why = None if _armed is None else _armed.poll()
    if why is not None:
        raise EmergencyStopped(f"emergency stop: {why}; nothing moves until the operator resets it")


def halt(robot: Robot) -> None:
    """Stand still, now: the robot's own `stop()` where it offers one, else `hold()`. Failures are logged."""
    stop: Callable[[], object] = getattr(robot, "stop", robot.hold)
    try:
        stop()
    except Exception as error:
        _log.error("the robot could not be told to stand still: %s", error)
        if stop != robot.hold:
            with contextlib.suppress(Exception):
                robot.hold()


def file_source(path: Path) -> Callable[[], str | None]:
    """A source that says stop while `path` exists: anything that can make a file can press it."""
    return lambda: f"the file {path} exists" if path.exists() else None


@contextlib.contextmanager
def signals(stop: EmergencyStop) -> Iterator[None]:
    """Within the block SIGUSR1 stops and SIGUSR2 resets. Only in the main thread, and not on Windows."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = (
        signal.signal(signal.SIGUSR1, lambda *_: stop.trigger("SIGUSR1")),
        signal.signal(signal.SIGUSR2, lambda *_: stop.reset() and None),
    )
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGUSR2, before[1])


@contextlib.contextmanager
def keyboard(stop: EmergencyStop, others: Callable[[str], object] = lambda _: None) -> Iterator[bool]:
    """Within the block Space and Enter on the terminal stop, `r` resets. others: called with every other key, from a
    thread; it must not raise. Yields whether there is a terminal to read."""
    if sys.platform == "win32" or sys.stdin is None or not sys.stdin.isatty():
        yield False
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    if os.tcgetpgrp(terminal) != os.getpgrp():
        yield False  # in the background the keys are another's, and touching the terminal would suspend this process
        return
    before = termios.tcgetattr(terminal)
    ended = threading.Event()
    arguments = (terminal, stop, others, ended)
    reader = threading.Thread(target=_read_keys, args=arguments, name="emergency keys", daemon=True)
    try:
        tty.setcbreak(terminal)  # keys at once, Ctrl-C as ever
        reader.start()
        yield True
    finally:
        ended.set()
        reader.join(2 * POLL_S)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _read_keys(terminal: int, stop: EmergencyStop, others: Callable[[str], object], ended: threading.Event) -> None:
    while not ended.is_set():
        ready, _, _ = select.select([terminal], [], [], POLL_S)
        try:
            keys = os.read(terminal, 64).decode(errors="replace") if ready else ""
        except OSError:
            keys = ""
        if ready and not keys:
            stop.trigger("the terminal is gone, and with it the stop key")
            return
        if any(key in STOP_KEYS for key in keys):
            stop.trigger("key pressed")
        elif any(key in RESET_KEYS for key in keys):
            stop.reset()
        for key in keys:
            if key not in STOP_KEYS + RESET_KEYS:
                others(key)
