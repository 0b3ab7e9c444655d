"""The load of the soak: robots of every kind, well-behaved and not, each in a thread of its own until told to stop."""

import contextlib
import json
import socket
import struct
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.sync.client import ClientConnection, connect

from recap_client.policy import RemotePolicy
from recap_client.record import read_rollout
from recap_client.robots.base import Observation, StepResult
from recap_client.runtime import LoopSettings, run_episode
from recap_client.session import SUBPROTOCOL, ServiceUnavailable
from recap_client.spec import RobotSpec
from recap_client.value import RemoteCritic
from recap_client.wire import pack, unpack

EPISODE_S = 6.0
HEARTBEAT_S = 1.0
_JPEG_QUALITY = 90
_REQUEST_S = 30.0


class Counts:
    """What happened so far, by name, and the latencies [s] since they were last taken. Used by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._latencies: dict[str, list[float]] = {}
        self.problems: list[str] = []

    def add(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def took(self, name: str, *seconds: float) -> None:
        with self._lock:
            self._latencies.setdefault(name, []).extend(seconds)

    def problem(self, what: str) -> None:
        """Something that must not happen; the first twenty are kept in words."""
        with self._lock:
            self._counts["problems"] += 1
            if len(self.problems) < 20:
                self.problems.append(what)

    def take(self) -> tuple[dict[str, int], dict[str, list[float]]]:
        """Counts since the start, latencies since the last call."""
        with self._lock:
            latencies, self._latencies = self._latencies, {}
            return dict(self._counts), latencies


class StillRobot:
    """A robot for any spec: random frames and a random state from its seed; it takes every action and ends in time."""

    def __init__(self, spec: RobotSpec) -> None:
        self.spec = spec
        self.steps = 0
        self._random = np.random.default_rng(0)

    def prompt(self, task: str) -> str:
        return task

    def reset(self, task: str, seed: int) -> None:  # noqa: ARG002
        self.steps, self._random = 0, np.random.default_rng(seed)

    def observe(self) -> Observation:
        images, state = frames(self.spec, self._random)
        return Observation(images, state, time.monotonic())

    def act(self, action: NDArray[np.float32]) -> StepResult:
        return self._step(action)

    def hold(self) -> StepResult:
        return self._step(np.zeros(len(self.spec.action), np.float32))

    def close(self) -> None:
        pass

    def _step(self, action: NDArray[np.float32]) -> StepResult:
        self.steps += 1
        done = self.steps >= EPISODE_S * self.spec.control_hz
        return StepResult(done, bool(self._random.integers(2)) if done else None, action)


def frames(spec: RobotSpec, random: np.random.Generator) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.float32]]:
    """Images and state that fit the spec."""
    images = {c.name: random.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in spec.cameras}
    return images, random.uniform(-0.5, 0.5, len(spec.state)).astype(np.float32)


class Load:
    """Starts the threads; `stop` ends them. policy, critic: ports on loopback."""

    def __init__(
        self, spec: RobotSpec, policy: int, critic: int, *, robots: int, openpi: int, patience_s: float
    ) -> None:
        self.spec, self.counts = spec, Counts()
        self._policy, self._critic, self._patience_s = policy, critic, patience_s
        self._over = threading.Event()
        self._task = spec.tasks[0] if spec.tasks else "do it"
        self._folder = tempfile.TemporaryDirectory(prefix="recap-soak-")
        work: list[tuple[str, Callable[[], None]]] = [
            ("heartbeat policy", lambda: self._heartbeat(f"ws://127.0.0.1:{policy}/act", "policy")),
            ("heartbeat critic", lambda: self._heartbeat(f"ws://127.0.0.1:{critic}/value", "critic")),
            ("bad requests", self._bad_requests),
            ("leavers", self._leave),
        ]
        work += [(f"robot {n}", lambda n=n: self._robot(n)) for n in range(robots)]  # type: ignore[misc]
        work += [(f"openpi {n}", lambda n=n: self._openpi(n)) for n in range(openpi)]  # type: ignore[misc]
        self._threads = [threading.Thread(target=self._until_over, args=pair, daemon=True) for pair in work]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask every thread to end, and wait: a robot finishes its episode."""
        self._over.set()
        for thread in self._threads:
            thread.join(2 * EPISODE_S + _REQUEST_S)
            if thread.is_alive():
                self.counts.problem(f"a thread of the load did not end: {thread.name}")
        self._folder.cleanup()

    def _until_over(self, name: str, work: Callable[[], None]) -> None:
        threading.current_thread().name = name
        while not self._over.is_set():
            try:
                work()
            except (
                ServiceUnavailable
            ):  # a busy machine misses deadlines, and the next episode begins while reconnecting
                self.counts.add("reconnecting")
                self._over.wait(1.0)
            except Exception as error:  # one that ends in silence would make the rest of the soak worthless
                where = traceback.extract_tb(error.__traceback__)[-1]
                self.counts.problem(f"{name}: {type(error).__name__} at {where.name}: {error}"[:300])
                self._over.wait(1.0)

    def _robot(self, number: int) -> None:
        """One session of the real client: some episodes in real time, recorded, every frame looked for afterwards."""
        name, jpeg = f"soak-{number}", _JPEG_QUALITY if number % 2 else None
        policy = RemotePolicy(f"ws://127.0.0.1:{self._policy}/act", self.spec, robot=name, jpeg_quality=jpeg,
                              forward=number > 0, timeout_s=_REQUEST_S)  # fmt: skip
        critic = None
        if number == 0:  # this one shows the critic its frames itself
            critic = RemoteCritic(f"ws://127.0.0.1:{self._critic}/value", self.spec, robot=name, timeout_s=_REQUEST_S)
        robot = StillRobot(self.spec)
        settings = LoopSettings(execute=4, image_format="jpeg")
        try:
            for episode in range(3):
                if self._over.is_set():
                    return
                path = Path(self._folder.name) / f"{name}-{time.monotonic_ns()}.mcap"
                result = run_episode(robot, self._task, episode, policy=policy, critic=critic, recording=path,
                                     settings=settings)  # fmt: skip
                self._note(result, path)
        finally:
            policy.close()
            if critic is not None:
                critic.close()
            self.counts.add("sessions")

    def _note(self, result: Any, path: Path) -> None:
        recorded = read_rollout(path, images=False)
        path.unlink()
        if not recorded.complete or recorded.dropped or recorded.steps != result.steps:
            self.counts.problem(
                f"{path.name}: {result.steps} steps, {recorded.steps} in the log: {result.record_error}"
            )
        self.counts.add("episodes")
        self.counts.add("steps", result.steps)
        self.counts.add("starved", result.starved)
        self.counts.took("robots", *result.act_latency_s)

    def _openpi(self, number: int) -> None:
        """A client of openpi's protocol: some requests, then a new connection."""
        random = np.random.default_rng(number)
        with _connected(f"ws://127.0.0.1:{self._policy}/") as link:
            unpack(link.recv(_REQUEST_S))
            for _ in range(100):
                images, state = frames(self.spec, random)
                keys = {f"observation/images/{name}": frame for name, frame in images.items()}
                began = time.monotonic()
                link.send(pack({**keys, "observation/state": state, "prompt": self._task}))
                reply = link.recv(_REQUEST_S)
                self.counts.took("openpi", time.monotonic() - began)
                if isinstance(reply, str) or "actions" not in unpack(reply):
                    raise ValueError(f"expected actions, got {str(reply)[:200]}")
                self.counts.add("openpi requests")
                if self._over.wait(0.1):
                    return
        self.counts.add("sessions")

    def _heartbeat(self, url: str, what: str) -> None:
        """A ping every second on a connection that stays; an answer after `patience_s` is a missed one."""
        with _connected(url, native=True) as link:
            unpack(link.recv(_REQUEST_S))
            due = time.monotonic()
            while not self._over.wait(max(0.0, due - time.monotonic())):
                began = time.monotonic()
                due = max(due + HEARTBEAT_S, began)
                link.send(pack({"type": "ping", "t": began}))
                reply = unpack(link.recv(_REQUEST_S))
                took = time.monotonic() - began
                if reply.get("type") != "pong" or reply.get("t") != began:
                    raise ValueError(f"{what}: expected the pong of {began}, got {str(reply)[:200]}")
                self.counts.took("heartbeat", took)
                self.counts.add("heartbeats")
                if took > self._patience_s:
                    self.counts.add("missed heartbeats")

    def _bad_requests(self) -> None:
        """What strangers send. Each is refused in words; none is an internal error, and the service lives on."""
        random = np.random.default_rng(1)
        images, state = frames(self.spec, random)
        good = {"images": images, "state": state, "prompt": self._task}
        bad: tuple[Any, ...] = (
            {"type": "act", "observation": {**good, "state": state[:-1]}},
            {"type": "act", "observation": {**good, "images": {}}},
            {"type": "act"},
            {"type": "nonsense"},
            [1, 2],
            "text",
        )
        for body in bad:
            with _connected(f"ws://127.0.0.1:{self._policy}/act", native=True) as link:
                unpack(link.recv(_REQUEST_S))
                link.send(pack(body))
                self._expect_refusal(str(unpack(link.recv(_REQUEST_S)).get("code")))
                link.send(random.bytes(200))
                self._expect_refusal(str(unpack(link.recv(_REQUEST_S)).get("code")))
            if self._over.wait(0.5):
                return
        for port, path in ((self._policy, "/act"), (self._critic, "/value")):
            self._expect_refusal(_post(f"http://127.0.0.1:{port}{path}", json.dumps({"observation": [1]}).encode()))
            self._expect_refusal(_post(f"http://127.0.0.1:{port}{path}", random.bytes(1000)))

    def _expect_refusal(self, code: str) -> None:
        self.counts.add("refused")
        if code not in ("bad_message", "bad_observation", "too_large", "400", "413", "422"):
            self.counts.problem(f"a bad request: expected a refusal, got {code}")

    def _leave(self) -> None:
        """A peer that asks and is gone, without a goodbye, before the answer comes."""
        images, state = frames(self.spec, np.random.default_rng(2))
        link = connect(f"ws://127.0.0.1:{self._policy}/act", subprotocols=[SUBPROTOCOL], compression=None, proxy=None)  # type: ignore[list-item]
        observation = {"images": images, "state": state, "prompt": self._task}
        link.send(pack({"type": "act", "seq": 1, "observation": observation}))
        link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not end
        with contextlib.suppress(OSError):
            link.socket.shutdown(socket.SHUT_RD)
        link.close_socket()
        self.counts.add("left")
        self._over.wait(2.0)


def _connected(url: str, *, native: bool = False) -> ClientConnection:
    subprotocols: Any = [SUBPROTOCOL] if native else None
    return connect(url, subprotocols=subprotocols, compression=None, max_size=None, proxy=None, open_timeout=_REQUEST_S,
                   close_timeout=1.0)  # fmt: skip


def _post(url: str, data: bytes) -> str:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=_REQUEST_S) as reply:
            return str(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return str(error.code)
