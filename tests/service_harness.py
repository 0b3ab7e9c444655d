"""Real services for tests: the real engine in real servers on loopback ports, and a plain client of `recap.v1`."""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from recap_client import wire
from repository_factory import TASKS
from services.common.engine import Engine, load_engine
from services.common.server import Running, running
from services.common.settings import CriticSettings, PolicySettings, Tls
from services.critic.app import create_app as create_critic_app
from services.policy.app import create_app as create_policy_app
from services.policy.pipeline import load_policy_engine


class SpyEngine:
    """A real engine whose calls are recorded, and which a test can hold up or make fail."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.calls: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.failure: Exception | None = None
        self.edit: Callable[[dict[str, Any]], dict[str, Any]] = lambda outputs: outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.calls.append({name: np.array(array) for name, array in inputs.items()})
        self.entered.set()
        self.gate.wait(20)
        if self.failure is not None:
            raise self.failure
        return self.edit(self._engine.run(inputs))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Every run waits inside until the end of the block."""
        self.entered.clear()
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()


@dataclass(frozen=True)
class Served:
    """A running service."""

    running: Running
    service: Any
    engine: SpyEngine

    @property
    def port(self) -> int:
        return self.running.port

    def front(self, name: str) -> int:
        """The port of a further front: `lerobot` or `groot`."""
        return int(self.running.server.config.app.state.ports[name])  # type: ignore[union-attr]

    def url(self, path: str = "/act") -> str:
        return f"ws://127.0.0.1:{self.port}{path}"

    def http(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, str]:
        return fetch(self.http(path), headers=headers)


def fetch(url: str, *, data: bytes | None = None, headers: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Status and body, also of error replies."""
    request = urllib.request.Request(url, data=data, headers=dict(headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@contextmanager
def policy_server(models: Path, *, port: int = 0, **settings: Any) -> Iterator[Served]:
    config = PolicySettings(**settings)
    engine = SpyEngine(load_policy_engine(models, config.beta, "onnxruntime"))
    app = create_policy_app(engine, config)
    with running(app, app.state.limits, port=port, tls=config.tls) as bound:
        yield Served(bound, app.state.service, engine)


@contextmanager
def critic_server(models: Path, *, port: int = 0, tls: Tls | None = None, **settings: Any) -> Iterator[Served]:
    engine = SpyEngine(load_engine(models, "critic"))
    app = create_critic_app(engine, CriticSettings(**settings))
    with running(app, app.state.limits, port=port, tls=tls) as bound:
        yield Served(bound, app.state.service, engine)


class NativeClient:
    """`recap.v1`, message by message."""

    def __init__(self, url: str, **options: Any) -> None:
        self.socket: ClientConnection = connect(
            url, subprotocols=["recap.v1"], compression=None, max_size=None, proxy=None, **options
        )
        self.welcome = self.receive()

    def __enter__(self) -> "NativeClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, message: Any) -> None:
        self.socket.send(wire.pack(message))

    def receive(self, timeout: float = 20.0) -> Any:
        return wire.unpack(self.socket.recv(timeout))

    def until_closed(self) -> tuple[list[Any], int]:
        """What still comes, and the close code (1006 for a reset)."""
        replies = []
        try:
            while True:
                replies.append(self.receive())
        except ConnectionClosed as closed:
            return replies, closed.rcvd.code if closed.rcvd is not None else 1006

    def ask(self, message: Any) -> Any:
        self.send(message)
        return self.receive()


def observation(spec: Any, *, seed: int = 0, prompt: str = TASKS[0], state: Any = None) -> dict[str, Any]:
    """A valid observation for a robot spec."""
    generator = np.random.default_rng(seed)
    images = {c.name: generator.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8) for c in spec.cameras}
    values = generator.uniform(-0.5, 0.5, len(spec.state)).astype(np.float32) if state is None else state
    return {"images": images, "state": values, "prompt": prompt}


def act(spec: Any, seq: int = 1, **parts: Any) -> dict[str, Any]:
    """An `act` message; parts replace or add to it."""
    return {
        "type": "act",
        "seq": seq,
        "t_obs": 12.5,
        "robot": "r1",
        "episode": "e1",
        "observation": observation(spec),
        **parts,
    }


def eventually(check: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Poll until `check` returns something true; fail after `timeout` seconds."""
    limit = time.monotonic() + timeout
    while not (result := check()):
        if time.monotonic() > limit:
            raise AssertionError(f"not within {timeout} s: {check}")
        time.sleep(0.01)
    return result
