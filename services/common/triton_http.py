"""Triton over HTTP, binary tensors behind a JSON header, with the standard library."""

import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from services.common.triton_api import Address, Call, Part, TritonError, refusal

_JSON_LENGTH = "Inference-Header-Content-Length"


class HttpTransport:
    """See `Transport`. A connection for every call under way; they are kept and used again."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._losses = 0

    @property
    def losses(self) -> int:
        """See `Transport.losses`."""
        return self._losses

    def ready(self, model: str, version: str, timeout_s: float) -> bool:
        """See `Transport.ready`."""
        try:
            self._ask("GET", f"{_model(model, version)}/ready", timeout_s)
        except TritonError as error:
            if error.reason in ("unreachable", "timeout"):
                raise
            return False
        return True

    def config(self, model: str, version: str, timeout_s: float) -> Mapping[str, Any]:
        """See `Transport.config`."""
        found = json.loads(self._ask("GET", f"{_model(model, version)}/config", timeout_s)[1])
        # here, and nowhere else, a field that is absent is written as an empty one
        for item in (*found.get("input", ()), *found.get("output", ())):
            if item.get("reshape") is None:
                item.pop("reshape", None)
        return dict(found)

    def load(self, model: str, timeout_s: float) -> None:
        """See `Transport.load`."""
        self._ask("POST", f"/v2/repository/models/{quote(model)}/load", timeout_s, [b"{}"])

    def unload(self, model: str, timeout_s: float) -> None:
        """See `Transport.unload`."""
        self._ask("POST", f"/v2/repository/models/{quote(model)}/unload", timeout_s, [b"{}"])

    def register(self, region: str, key: str, size: int, timeout_s: float) -> None:
        """See `Transport.register`."""
        body = json.dumps({"key": key, "offset": 0, "byte_size": size}).encode()
        self._ask("POST", f"/v2/systemsharedmemory/region/{quote(region)}/register", timeout_s, [body])

    def unregister(self, region: str, timeout_s: float) -> None:
        """See `Transport.unregister`."""
        self._ask("POST", f"/v2/systemsharedmemory/region/{quote(region)}/unregister", timeout_s, [b""])

    def infer(self, call: Call, timeout_s: float) -> dict[str, bytes | memoryview]:
        """See `Transport.infer`."""
        parameters: dict[str, int] = {"timeout": call.timeout_us}
        if call.priority is not None:
            parameters["priority"] = call.priority
        head = json.dumps(
            {
                "parameters": parameters,
                "inputs": [
                    {
                        "name": part.tensor.name,
                        "datatype": part.tensor.datatype,
                        "shape": part.shape,
                        "parameters": _place(part) or {"binary_data_size": part.nbytes},
                    }
                    for part in call.inputs
                ],
                "outputs": [
                    {"name": part.tensor.name, "parameters": _place(part) or {"binary_data": True}}
                    for part in call.outputs
                ],
            },
            separators=(",", ":"),
        ).encode()
        parts: list[Any] = [head, *(part.data for part in call.inputs if part.data is not None)]
        extra = {_JSON_LENGTH: str(len(head))}
        if call.traceparent is not None:
            extra["traceparent"] = call.traceparent
        headers, body = self._ask("POST", f"{_model(call.model, call.version)}/infer", timeout_s, parts, extra)
        return _outputs(headers, body)

    def close(self) -> None:
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def _ask(
        self, method: str, path: str, timeout_s: float, parts: list[Any] | None = None, extra: Any = None
    ) -> tuple[Any, bytes]:
        """Headers and body of a good answer."""
        with self._connection(timeout_s) as connection:
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in (extra or {}).items():
                connection.putheader(name, value)
            if parts is not None:
                connection.putheader("Content-Length", str(sum(memoryview(part).nbytes for part in parts)))
            connection.endheaders()
            for part in parts or ():
                connection.send(memoryview(part).cast("B"))
            reply = connection.getresponse()
            body = reply.read()
        if reply.status != 200:
            raise refusal(_error(body, reply.status), unavailable=reply.status in (404, 503))
        return reply.headers, body

    @contextmanager
    def _connection(self, timeout_s: float) -> Iterator[http.client.HTTPConnection]:
        """A connection; one on which anything went wrong is not used again."""
        if timeout_s <= 0:
            raise TritonError("timeout", "no time left to ask")
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = http.client.HTTPConnection(self._address.host.strip("[]"), self._address.port)
        try:
            connection.timeout = timeout_s
            if connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            yield connection
        except TimeoutError as error:
            self._lose(connection)
            raise TritonError("timeout", f"no answer within {timeout_s:.3f} s") from error
        except (OSError, http.client.HTTPException) as error:
            self._lose(connection)
            raise TritonError("unreachable", f"{type(error).__name__}: {error}") from error
        except BaseException:
            self._lose(connection)
            raise
        with self._lock:
            self._idle.append(connection)

    def _lose(self, connection: http.client.HTTPConnection) -> None:
        connection.close()
        self._losses += 1


def _model(model: str, version: str) -> str:
    return f"/v2/models/{quote(model)}/versions/{quote(version)}"


def _place(part: Part) -> dict[str, Any] | None:
    if part.region is None:
        return None
    return {
        "shared_memory_region": part.region,
        "shared_memory_offset": part.offset,
        "shared_memory_byte_size": part.nbytes,
    }


def _error(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return f"status {status}"


def _outputs(headers: Any, body: bytes) -> dict[str, bytes | memoryview]:
    try:
        length = int(headers.get(_JSON_LENGTH, len(body)))
        at, view = length, memoryview(body)
        found: dict[str, bytes | memoryview] = {}
        for item in json.loads(body[:length])["outputs"]:
            size = item.get("parameters", {}).get("binary_data_size")
            if size is not None:
                found[str(item["name"])] = view[at : at + int(size)]
                at += int(size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TritonError("refused", f"expected an inference response, got {body[:80]!r}") from error
    return found
