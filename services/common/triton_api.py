"""What is said to a Triton server, whichever way it goes: the KServe v2 protocol with Triton's extensions for shared
memory, model control and model configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from numpy.typing import NDArray

from services.common.engine import EngineError

DEFAULT_URL = "grpc://127.0.0.1:8001"

_PORTS = {"http": 8000, "grpc": 8001}
_DTYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
}

Reason = Literal["unreachable", "timeout", "late", "memory", "absent", "refused"]
"""unreachable: no connection, or it broke. timeout: no answer in time. late: Triton's queue gave the request up.
memory: a shared memory region that Triton does not know. absent: the model is not there now. refused: any other error.
"""


class TritonError(Exception):
    """A call to Triton failed."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Address:
    """shm: offer shared memory. timeout_s: the longest that a run may take. wait_s: how long a start waits for Triton
    and for the model."""

    scheme: str
    host: str
    port: int
    shm: bool = True
    timeout_s: float = 10.0
    wait_s: float = 30.0

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model. shape: of one sample; wire: the same as Triton has it, which knows no scalars."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    wire: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(_DTYPES[self.datatype])

    @property
    def nbytes(self) -> int:
        """Of one sample."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """A tensor of one call, `count` samples. data: its bytes, or None where they lie in (go to) shared memory, in the
    region `region` from byte `offset` on."""

    tensor: Tensor
    count: int
    data: NDArray[Any] | None = None
    region: str | None = None
    offset: int = 0

    @property
    def shape(self) -> list[int]:
        return [self.count, *self.tensor.wire]

    @property
    def nbytes(self) -> int:
        return self.count * self.tensor.nbytes


@dataclass(frozen=True)
class Call:
    """timeout_us: how long the request may wait in Triton's queue. priority: 1 before 2; None = the model's default.
    traceparent: the span that it is part of, where it is traced."""

    model: str
    version: str
    inputs: tuple[Part, ...]
    outputs: tuple[Part, ...]
    timeout_us: int
    priority: int | None = None
    traceparent: str | None = None


class Transport(Protocol):
    """A way to a server, for any number of threads. Every method raises TritonError, within its timeout."""

    @property
    def losses(self) -> int:
        """Grows when a connection is lost: who answers next may be another server."""

    def ready(self, model: str, version: str, timeout_s: float) -> bool: ...

    def config(self, model: str, version: str, timeout_s: float) -> Mapping[str, Any]:
        """The model configuration, with the names of `config.pbtxt`."""

    def load(self, model: str, timeout_s: float) -> None: ...

    def unload(self, model: str, timeout_s: float) -> None: ...

    def register(self, region: str, key: str, size: int, timeout_s: float) -> None:
        """Let the server map the POSIX shared memory object `key`."""

    def unregister(self, region: str, timeout_s: float) -> None: ...

    def infer(self, call: Call, timeout_s: float) -> dict[str, bytes | memoryview]:
        """The bytes of every output that does not go to shared memory."""

    def close(self) -> None: ...


def parse_url(url: str) -> Address:
    """`grpc://host[:port]` or `http://host[:port]`, with `?shm=off`, `timeout=SECONDS`, `wait=SECONDS`. Raises
    EngineError."""
    parts = urlsplit(url)
    try:
        port = parts.port
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        shm = {"on": True, "off": False}[options.pop("shm", "on")]
        timeout_s, wait_s = float(options.pop("timeout", 10.0)), float(options.pop("wait", 30.0))
        good = parts.scheme in _PORTS and parts.hostname and not parts.path.strip("/") and not options
        if not good or not (timeout_s > 0 and wait_s >= 0):
            raise ValueError
    except (ValueError, KeyError) as error:
        raise EngineError(
            "Triton's address: expected grpc://HOST:PORT or http://HOST:PORT, and after ? any of shm=on|off, "
            f"timeout=SECONDS, wait=SECONDS joined by &; got {url!r}"
        ) from error
    assert parts.hostname is not None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Address(parts.scheme, host, port or _PORTS[parts.scheme], shm, timeout_s, wait_s)


def refusal(message: str, *, unavailable: bool) -> TritonError:
    """What an error answer of Triton means. unavailable: its status says "not found" or "unavailable"."""
    lowered = message.lower()
    if "timeout expired" in lowered:
        return TritonError("late", message)
    if "shared memory region" in lowered:
        return TritonError("memory", message)
    return TritonError("absent" if unavailable or "unknown model" in lowered else "refused", message)


def tensors(config: Mapping[str, Any], kind: Literal["input", "output"]) -> tuple[Tensor, ...]:
    """The inputs or outputs in a model configuration. Raises EngineError for a type that no engine here has."""
    found = []
    for item in config.get(kind, ()):
        datatype = str(item["data_type"]).removeprefix("TYPE_")
        if datatype not in _DTYPES:
            raise EngineError(f"{kind} {item['name']}: expected one of {sorted(_DTYPES)}, got {datatype}")
        wire = tuple(int(n) for n in item["dims"])
        shape = tuple(int(n) for n in item["reshape"].get("shape", ())) if "reshape" in item else wire
        if any(n < 1 for n in (*wire, *shape)):
            raise EngineError(f"{kind} {item['name']}: expected fixed extents, got {list(wire)}")
        found.append(Tensor(item["name"], datatype, shape, wire))
    return tuple(found)
