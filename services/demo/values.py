"""The critic's event stream, followed from a thread: what every robot is worth now, and the history of each episode."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

_RETRY_S = 0.2
_SILENCE_S = 30.0  # the service sends a sign of life every ten seconds


class ValueFollower:
    """Follows `/value/stream` of a critic service until closed; reconnects by itself."""

    def __init__(self, critic: str) -> None:
        self._address = urlsplit(critic).netloc
        self._lock = threading.Lock()
        self._latest: dict[str, dict[str, Any]] = {}
        self._history: dict[str, dict[float, float]] = {}  # episode -> control step -> value
        self._alarms: set[str] = set()
        self._socket: socket.socket | None = None
        self._closed = threading.Event()
        self.connected = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="value-follower", daemon=True)
        self._thread.start()

    def latest(self, robot: str) -> dict[str, Any]:
        """The newest event of a robot; empty before the first."""
        with self._lock:
            return dict(self._latest.get(robot, {}))

    def history(self, episode: str) -> list[tuple[float, float]]:
        """(control step, value) of an episode, oldest first."""
        with self._lock:
            return sorted(self._history.get(episode, {}).items())

    def alarmed(self, episode: str) -> bool:
        """True when the critic raised an alarm in that episode."""
        with self._lock:
            return episode in self._alarms

    def close(self) -> None:
        """Stop following."""
        self._closed.set()
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread out of its reading
        self._thread.join(timeout=2.0)

    def take(self, event: dict[str, Any]) -> None:
        """Note one event of the stream."""
        robot, episode = event.get("robot"), event.get("episode")
        if robot is None or episode is None:
            return
        with self._lock:
            self._latest[robot] = event
            if event.get("alarm"):
                self._alarms.add(episode)
            points = list(event.get("history", ()))  # of a snapshot: also what was missed while not connected
            if event.get("type", "value") == "value" and event.get("value") is not None:
                points.append((event["step"], event["value"]))
            self._history.setdefault(episode, {}).update((float(step), float(value)) for step, value in points)

    def _follow(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                for event in self._events():
                    self.take(event)
                    if self._closed.is_set():
                        return
            self.connected.clear()
            time.sleep(_RETRY_S)

    def _events(self) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection(self._address, timeout=_SILENCE_S)
        try:
            connection.request("GET", "/value/stream", headers={"Accept": "text/event-stream"})
            self._socket = connection.sock
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"/value/stream: expected 200, got {response.status}")
            self.connected.set()
            while line := response.readline():
                if line.startswith(b"data:"):
                    yield json.loads(line[5:])
        finally:
            connection.close()


def values_at(history: list[tuple[float, float]], steps: int) -> NDArray[np.float64]:
    """A value for each of `steps` control steps: linear between the critic's, NaN when it gave none."""
    if not history:
        return np.full(steps, np.nan)
    at, values = np.array(sorted(history)).T
    return np.asarray(np.interp(np.arange(steps), at, values), np.float64)


def value_midway(history: list[tuple[float, float]], steps: int) -> float | None:
    """Mean value over the middle fifth of an episode of `steps` control steps; None when the critic gave none."""
    if not history or steps == 0:
        return None
    curve = values_at(history, steps)
    low, high = int(0.4 * (steps - 1)), int(np.ceil(0.6 * (steps - 1)))
    return float(curve[low : high + 1].mean())
