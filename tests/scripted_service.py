"""A real websocket server speaking recap.v1 that misbehaves on request, for tests of the robot side.

`script(n)` names what happens to the n-th act/observe message since the server started: "" answer, "late:SECONDS",
"drop", "error:CODE", "nan", "garbage", "wrong_seq", "text", "shape", "model:VERSION" (another than the welcome's).
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

from recap_client.spec import RobotSpec
from recap_client.wire import pack, unpack

CHUNK = 8


class ScriptedService:
    """Use as a context manager; `received` lists every message in order, `url` is where it listens."""

    def __init__(self, spec: RobotSpec, kind: str = "policy", script: Callable[[int], str] = lambda _: "",
                 act: Callable[[dict[str, Any]], np.ndarray] | None = None, port: int = 0,
                 value: Callable[[dict[str, Any]], float] = lambda _: -0.5) -> None:  # fmt: skip
        self.spec, self.kind, self.script, self.port, self.value = spec, kind, script, port, value
        self.act = act or (lambda _: np.full((CHUNK, len(spec.action)), 0.1, np.float32))
        self.received: list[dict[str, Any]] = []
        self.connections: list[ServerConnection] = []
        self._count = 0
        self._server: Server | None = None

    def __enter__(self) -> "ScriptedService":
        self._server = serve(self._handle, "127.0.0.1", self.port, subprotocols=["recap.v1"], compression=None,
                             max_size=2**26)  # type: ignore[list-item] # fmt: skip
        self.port = self._server.socket.getsockname()[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        for connection in self.connections:
            connection.close_socket()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/act"

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.received if message["type"] == kind]

    def _handle(self, connection: ServerConnection) -> None:
        self.connections.append(connection)
        spec = {"kind": self.kind, "robot": self.spec.to_json(), "chunk": CHUNK, "max_tokens": 16}
        model = {"name": "scripted", "version": "1", "hash": "0" * 64}
        welcome = {"type": "welcome", "protocol": "recap.v1", "kind": self.kind, "spec": spec, "model": model}
        try:
            connection.send(pack(welcome))
            for frame in connection:
                message = unpack(frame)
                self.received.append(message)
                self._answer(connection, message)
        except ConnectionClosed:
            pass

    def _answer(self, connection: ServerConnection, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind in ("reset", "outcome"):
            connection.send(pack({"type": "ok"}))
        elif kind == "ping":
            connection.send(pack({"type": "pong", "t": message["t"], "t_server": time.monotonic() + 100.0}))
        else:
            what, _, detail = self.script(self._count).partition(":")
            self._count += 1
            self._misbehave(connection, message, what, detail)

    def _misbehave(self, connection: ServerConnection, message: dict[str, Any], what: str, detail: str) -> None:
        if what == "late":
            time.sleep(float(detail))
        if what == "drop":
            connection.close_socket()
            return
        if what in ("garbage", "text"):
            connection.send(b"\xc1garbage" if what == "garbage" else "Traceback: something broke")
            return
        reply = self._reply(message)
        if what == "error":
            reply = {"type": "error", "seq": message["seq"], "code": detail, "message": "scripted", "field": "state",
                     "expected": "4 numbers", "got": "3"}  # fmt: skip
        elif what == "wrong_seq":
            reply["seq"] += 1
        elif what == "model":
            reply["model"] = {"name": "scripted", "version": detail, "hash": detail * 64}
        elif what == "nan":
            reply["actions"] = np.full_like(reply["actions"], np.nan)
        elif what == "shape":
            reply["actions"] = reply["actions"][0]
        connection.send(pack(reply))

    def _reply(self, message: dict[str, Any]) -> dict[str, Any]:
        head = {"seq": message["seq"], "t_obs": message["t_obs"]}
        if self.kind == "critic":
            value = self.value(message)
            return {"type": "value", **head, "value": value, "progress": 1 + value, "std": 0.1, "advantage": None,
                    "seconds_to_success": 1.5, "alarm": value < -0.9}  # fmt: skip
        timing = {"decode_ms": 0.1, "queue_ms": 0.0, "infer_ms": 1.0, "encode_ms": 0.1, "total_ms": 1.2}
        return {"type": "chunk", **head, "actions": self.act(message), "server_timing": timing, "t_server": 0.0}
