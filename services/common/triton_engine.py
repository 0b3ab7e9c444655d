"""The engine of a Triton server: the same model as in our repository, run elsewhere.

Spec and tokenizer come from the service's own repository; that Triton runs the same version is checked at the start and
again whenever the connection was lost. A Triton that is away gives every request a typed error within its deadline, and
is used again as soon as it is back.
"""

import hashlib
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recap_model.spec import Spec
from recap_model.tokenizer import TextTokenizer
from services.common import tracing
from services.common.engine import Arrays, EngineError
from services.common.engine_inputs import Input, check_inputs, fitting_size, ones, timed_runs
from services.common.errors import ServiceError
from services.common.logs import get_logger
from services.common.repository import ModelFolder
from services.common.triton_api import (
    DEFAULT_URL,
    Address,
    Call,
    Part,
    Tensor,
    Transport,
    TritonError,
    parse_url,
    tensors,
)
from services.common.triton_connect import connect
from services.common.triton_memory import Layout, Slot, Slots

_CALL_S = 5.0  # for everything but inference and loading
_LOAD_S = 300.0
_WARM_UP_S = 120.0
_POLL_S = 0.1
_URGENT, _PATIENT = 1, 2  # Triton's priorities: a request with a deadline goes first

Outputs = dict[str, NDArray[Any]]

log = get_logger("triton")


class TritonEngine:
    """See `Engine`; `run` may also be called from several threads at once. threads: Triton's own affair.

    url: see `parse_url`. Raises EngineError when there is no Triton within its waiting time, when it has not this model
    and cannot load it, or when its model is another one.
    """

    def __init__(self, model: ModelFolder, threads: int = 1, url: str = DEFAULT_URL) -> None:  # noqa: ARG002
        self._model, self._address = model, parse_url(url)
        self._wanted = identity(model)
        self._transport = connect(self._address)
        try:
            load_version(self._transport, self._address, model.name, model.version)
            config = self._transport.config(model.name, model.version, _CALL_S)
            self._require_identity(config)
        except TritonError as error:
            self._transport.close()
            raise EngineError(f"{self._where}: {error}") from error
        except BaseException:
            self._transport.close()
            raise
        self._seen = self._transport.losses
        self._sizes = _batch_sizes(model, config)
        self._in, self._out = tensors(config, "input"), tensors(config, "output")
        self._inputs = {tensor.name: Input(tensor.dtype, tensor.shape) for tensor in self._in}
        self._layout = Layout.of((*self._in, *self._out), self._sizes[-1])
        self._run_times: dict[int, float] = {}
        self._told = False
        self._slots = Slots(self._layout.size, self._transport.register, self._refused) if self._address.shm else None

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def version(self) -> str:
        return self._model.version

    @property
    def hash(self) -> str:
        return self._model.hash

    @property
    def spec(self) -> Spec:
        return self._model.spec

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._model.tokenizer

    @property
    def run_times(self) -> Mapping[int, float]:
        return self._run_times

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return self._sizes

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self._inputs)

    @property
    def input_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: item.shape for name, item in self._inputs.items()}

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Engine.run`. Nothing is padded here: the model in Triton does that, and fewer bytes travel.

        Also raises ServiceError: `unavailable`, `deadline`.
        """
        return self.run_within(inputs, None)

    def run_within(self, inputs: Arrays, seconds: float | None) -> dict[str, NDArray[Any]]:
        """`run` for requests that have `seconds` left; None = as long as the address allows."""
        count = self._check(inputs)
        limit = self._address.timeout_s if seconds is None else min(seconds, self._address.timeout_s)
        return self._run(inputs, count, limit, deadline=seconds is not None)

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""

        def run(size: int) -> None:
            inputs = ones(self._inputs, size)
            self._run(inputs, self._check(inputs), _WARM_UP_S, deadline=False)

        self._run_times = timed_runs(self._sizes, run)

    def close(self) -> None:
        names = self._slots.names() if self._slots is not None else []
        for name in names:
            try:
                self._transport.unregister(name, 1.0)
            except TritonError:
                break  # a Triton that is gone has forgotten them
        if self._slots is not None:
            self._slots.reset()
        self._transport.close()

    @property
    def _where(self) -> str:
        return f"{self.name} {self.version} at {self._address}"

    def _check(self, inputs: Arrays) -> int:
        count = check_inputs(self.name, self._inputs, inputs)
        fitting_size(self.name, self._sizes, count)
        return count

    def _run(self, inputs: Arrays, count: int, limit_s: float, *, deadline: bool) -> dict[str, NDArray[Any]]:
        until = time.monotonic() + limit_s
        failure = TritonError("timeout", "no time left to ask")
        for _ in range(2):  # a connection that broke while nobody looked is no reason to fail
            if time.monotonic() >= until:
                break
            try:
                self._know_server(until)
                return self._ask(inputs, count, until, _URGENT if deadline else _PATIENT)
            except TritonError as error:
                failure = error
                if error.reason not in ("unreachable", "memory"):
                    break
                if self._slots is not None:
                    self._slots.reset()
        raise self._fault(failure, limit_s, deadline=deadline) from failure

    def _ask(self, inputs: Arrays, count: int, until: float, priority: int) -> Outputs:
        slot = None if self._slots is None else self._slots.take(until - time.monotonic())
        answered = False
        try:
            outputs = self._infer(slot, inputs, count, until, priority)
            answered = True
            return outputs
        except TritonError as error:
            answered = error.reason in ("late", "memory", "absent", "refused")
            raise
        finally:
            if slot is not None and self._slots is not None:
                (self._slots.give if answered else self._slots.set_aside)(slot)

    def _infer(self, slot: Slot | None, inputs: Arrays, count: int, until: float, priority: int) -> Outputs:
        at = self._layout.offsets
        if slot is None:
            given = tuple(Part(t, count, data=np.ascontiguousarray(inputs[t.name])) for t in self._in)
            wanted = tuple(Part(t, count) for t in self._out)
        else:
            given = tuple(slot.put(t, inputs[t.name], at[t.name]) for t in self._in)
            wanted = tuple(Part(t, count, region=slot.name, offset=at[t.name]) for t in self._out)
        left_s = until - time.monotonic()
        timeout_us = max(int(1e6 * left_s), 1)
        with tracing.call("triton.infer") as sent:
            call = Call(self.name, self.version, given, wanted, timeout_us, priority, sent)
            found = self._transport.infer(call, left_s)
        if slot is not None:
            found = {t.name: slot.get(t, count, at[t.name]) for t in self._out}
        return {tensor.name: self._array(tensor, count, found.get(tensor.name, b"")) for tensor in self._out}

    def _array(self, tensor: Tensor, count: int, data: bytes | memoryview) -> NDArray[Any]:
        if len(data) != count * tensor.nbytes:
            raise EngineError(
                f"{self._where}: output {tensor.name}: expected {count * tensor.nbytes} bytes for {tensor.datatype} "
                f"{[count, *tensor.shape]}, got {len(data)}; a python model on numpy 2 must return them by DLPack"
            )
        return np.frombuffer(data, tensor.dtype).reshape(count, *tensor.shape)

    def _know_server(self, until: float) -> None:
        """After a lost connection: is it the same model that answers now?"""
        losses = self._transport.losses
        if losses == self._seen:
            return
        try:
            config = self._transport.config(self.name, self.version, until - time.monotonic())
            self._require_identity(config)
        except EngineError as error:
            raise ServiceError("unavailable", str(error)) from error
        self._seen = losses

    def _require_identity(self, config: Mapping[str, Any]) -> None:
        parameters = config.get("parameters", {})
        for part, wanted in self._wanted.items():
            key = f"recap.{self.version}.{part}"
            got = str(parameters.get(key, {}).get("string_value", "nothing"))
            if got != wanted:
                raise EngineError(
                    f"{self._where}: {part} of the model: expected {wanted[:12]} ({self._model.path}), got {got[:12]}; "
                    "give --models the repository that Triton serves, and reload the model in Triton after an export"
                )

    def _refused(self, why: str) -> None:
        if not self._told:
            log.warning("no shared memory with Triton; tensors are sent", engine=self._where, reason=why)
            self._told = True

    def _fault(self, error: TritonError, limit_s: float, *, deadline: bool) -> Exception:
        if error.reason == "refused":
            return EngineError(f"{self._where}: {error}")
        if error.reason in ("timeout", "late") and deadline:
            return ServiceError(
                "deadline",
                f"{self._where}: no answer within {1000 * limit_s:.1f} ms",
                field="deadline_ms",
                expected=f"an answer within {1000 * limit_s:.1f} ms",
            )
        return ServiceError(
            "unavailable", f"{self._where}: {error}; it is asked again with the next request", retry_after_s=1.0
        )


def identity(model: ModelFolder) -> dict[Literal["spec", "parity", "model"], str]:
    """What the configuration of this version says in Triton, as `recap.VERSION.NAME`: sha256 of the spec and of the
    parity receipt, and the content hash of the folder."""
    return {
        "spec": hashlib.sha256((model.path / "spec.json").read_bytes()).hexdigest(),
        "parity": hashlib.sha256((model.path / "parity.json").read_bytes()).hexdigest(),
        "model": model.hash,
    }


def load_version(transport: Transport, address: Address, name: str, version: str) -> None:
    """Wait until Triton serves a version, and have it loaded where Triton lets its models be controlled. The versions
    that it serves already go on meanwhile. Raises EngineError after the address's waiting time."""
    until = time.monotonic() + address.wait_s
    asked, told, refused = False, False, ""
    while True:
        try:
            if transport.ready(name, version, _CALL_S):
                return
            why = refused or "the model is not ready"
            if not asked:
                asked = True
                transport.load(name, _LOAD_S)  # returns when it is loaded
                continue
        except TritonError as error:
            why = str(error)
            refused = why if asked else ""
        if time.monotonic() > until:
            raise EngineError(
                f"{name} {version} at {address}: expected a Triton that serves this model, got none within "
                f"{address.wait_s:.0f} s: {why}; start it on the repository, or see its log"
            )
        if not told:
            log.info("waiting for Triton", model=name, version=version, address=str(address), reason=why)
            told = True
        time.sleep(_POLL_S)


def unload(url: str, name: str) -> None:
    """Let Triton drop all versions of a model; it must run with `--model-control-mode=explicit`. Raises EngineError."""
    address = parse_url(url)
    transport = connect(address)
    try:
        transport.unload(name, _LOAD_S)
    except TritonError as error:
        raise EngineError(f"{name} at {address}: not unloaded: {error}") from error
    finally:
        transport.close()


def _batch_sizes(model: ModelFolder, config: Mapping[str, Any]) -> tuple[int, ...]:
    largest = int(config.get("max_batch_size", 0))
    sizes = tuple(sorted(model.manifest.parameters.get("batch_sizes") or (1, 2, 4, 8)))
    fitting = tuple(size for size in sizes if size <= largest)
    if not fitting:
        raise EngineError(f"{model.path}: max_batch_size: expected at least {sizes[0]} in Triton, got {largest}")
    return fitting
