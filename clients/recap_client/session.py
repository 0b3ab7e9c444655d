"""One websocket to a service, speaking `recap.v1`: strict request and reply, deadlines, reconnecting by itself.

A reply that comes too late is never used: the socket is closed, so that it cannot be taken for the answer to the next
request. Reconnecting happens in a thread; while it lasts, every call fails at once with `ServiceUnavailable`. Another
thread pings, so that a connection whose other end is gone without a word is noticed between calls too.
"""

import logging
import os
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

from recap_client.clock import ClockOffset
from recap_client.spec import RobotSpec, SpecError, require_equal
from recap_client.tls import advice, client_context
from recap_client.wire import MAX_BYTES, WireError, pack, unpack

SUBPROTOCOL = "recap.v1"
PROXY_VARIABLE = "RECAP_PROXY"

_log = logging.getLogger(__name__)


class ServiceError(RuntimeError):
    """A call to a service failed."""


class ServiceUnavailable(ServiceError):
    """There is no connection now; it is being re-established in the background."""


class DeadlineExceeded(ServiceError):
    """No reply within the deadline; the connection was dropped so that the late reply is never used."""


class ProtocolError(ServiceError):
    """The service does not speak recap.v1, is of another kind, or answered something else than was asked."""


class ServiceRefused(ServiceError):
    """The service answered with a typed error; the connection stays. code: e.g. "bad_observation", "deadline"."""

    def __init__(self, code: str, message: str, field: str | None, expected: str | None, got: str | None) -> None:
        detail = f" ({field}: expected {expected}, got {got})" if field and field not in message else ""
        super().__init__(f"{code}: {message}{detail}")
        self.code, self.field, self.expected, self.got = code, field, expected, got


@dataclass(frozen=True)
class Welcome:
    """First message of a service. kind: "policy" | "critic"; spec: of the model; model: name, version, hash."""

    kind: str
    spec: Mapping[str, Any]
    model: Mapping[str, str]
    details: Mapping[str, Any] = field(default_factory=dict)


class Session:
    """A connection that lives as long as the object. Calls may come from one thread at a time.

    kind, spec: a service of another kind, or made for another robot, is refused (ProtocolError, SpecError), also when
    it comes back as such after a reconnect. headers: e.g. {"Authorization": "Api-Key ..."}. timeout_s: for connecting
    and for calls without a deadline of their own. heartbeat_s: seconds between pings, and for the answer to one; a dead
    connection is noticed after at most twice that. proxy: URL of an HTTP proxy (http://HOST:PORT), None = the one in
    the environment variable RECAP_PROXY, if any. tls_ca: file of the CAs to trust at `wss://`, see `client_context`.
    Raises on construction when the first connection fails: ServiceUnavailable (with the address and the reason),
    ProtocolError, SpecError.

    `clock`: the offset of the service's clock, better with every reply and following it.
    """

    def __init__(self, url: str, kind: str, spec: RobotSpec, *, timeout_s: float = 5.0,
                 headers: Mapping[str, str] | None = None, backoff_s: tuple[float, float] = (0.1, 2.0),
                 heartbeat_s: float = 5.0, proxy: str | None = None,
                 tls_ca: Path | str | None = None) -> None:  # fmt: skip
        self.url, self.kind, self.spec = url, kind, spec
        self.reconnects = 0
        self.clock = ClockOffset()
        self._proxy, self._heartbeat_s, self._tls_ca = configured_proxy(proxy), heartbeat_s, tls_ca
        self._timeout_s, self._headers, self._backoff_s = timeout_s, dict(headers or {}), backoff_s
        self._lock = threading.Lock()  # guards the three below
        self._link: ClientConnection | None = None
        self._closed = False
        self._connecting = False
        self._ending = threading.Event()
        self._link, self.welcome = self._connect()
        threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True).start()

    @property
    def connected(self) -> bool:
        return self._link is not None

    def call(self, message: Mapping[str, Any], *, deadline_s: float | None = None) -> dict[str, Any]:
        """Send one message and return its reply (a map with "type").

        deadline_s: seconds from now; None = the session's timeout. A reply with "seq" must carry the one sent.
        Raises ServiceUnavailable, DeadlineExceeded, ProtocolError (these drop the connection), ServiceRefused, and
        WireError for a message that cannot be encoded.
        """
        data = pack(message)
        sent = time.monotonic()
        limit = self._timeout_s if deadline_s is None else deadline_s
        until = sent + limit
        link = self._link
        if link is None:
            raise ServiceUnavailable(f"{self.url}: not connected; reconnecting in the background")
        try:
            link.send(data)
            frame = link.recv(timeout=max(0.0, until - time.monotonic()))
        except TimeoutError:
            self._drop(link, "a reply missed its deadline")
            raise DeadlineExceeded(
                f"{self.url}: {message.get('type')}: expected a reply within {limit * 1e3:.0f} ms, got none"
            ) from None
        except (ConnectionClosed, OSError) as error:
            self._drop(link, str(error))
            raise ServiceUnavailable(f"{self.url}: the connection was lost: {error}") from error
        received = time.monotonic()
        reply = self._check(link, message, frame)
        _note_clock(self.clock, reply, sent, received)
        return reply

    def close(self) -> None:
        """Close the connection and stop reconnecting. May be called twice."""
        with self._lock:
            self._closed = True
            link, self._link = self._link, None
        self._ending.set()
        if link is not None:
            link.close()

    def _check(self, link: ClientConnection, message: Mapping[str, Any], frame: Any) -> dict[str, Any]:
        try:
            reply = unpack(frame)
        except WireError as error:
            self._drop(link, str(error))
            raise ProtocolError(f"{self.url}: the reply does not decode: {error}: {str(frame)[:500]}") from error
        kind = reply.get("type") if isinstance(reply, dict) else None
        if kind is None or ("seq" in message and reply.get("seq") != message["seq"] and kind != "error"):
            self._drop(link, "the reply does not fit the request")
            raise ProtocolError(f"{self.url}: expected a reply to seq {message.get('seq')}, got {str(reply)[:200]}")
        if kind == "error":
            raise ServiceRefused(
                str(reply.get("code")), str(reply.get("message")), *(reply.get(k) for k in ("field", "expected", "got"))
            )
        return dict(reply)

    def _connect(self) -> tuple[ClientConnection, Welcome]:
        try:
            link = connect(
                self.url, subprotocols=[SUBPROTOCOL], compression=None, max_size=MAX_BYTES, proxy=self._proxy,  # type: ignore[list-item]
                additional_headers=self._headers, open_timeout=self._timeout_s, close_timeout=0.2, ping_interval=None,
                ssl=client_context(self.url, self._tls_ca),
            )  # fmt: skip
        except (OSError, WebSocketException, TimeoutError) as error:
            raise ServiceUnavailable(
                f"{self.url}: cannot connect: {error}; {advice(self.url, error, f'{self.kind} service')}"
            ) from error
        try:
            _limit_sending(link, self._timeout_s)
            first = unpack(link.recv(timeout=self._timeout_s))
            if not isinstance(first, dict) or first.get("type") != "welcome" or first.get("protocol") != SUBPROTOCOL:
                raise ProtocolError(f"{self.url}: expected a welcome of {SUBPROTOCOL}, got {str(first)[:200]}")
            if first.get("kind") != self.kind:
                raise ProtocolError(f"{self.url}: expected a {self.kind} service, got a {first.get('kind')} service")
            details = {key: value for key, value in first.items() if key not in ("spec", "model", "kind", "type")}
            served = RobotSpec.from_json(first["spec"]["robot"])
            require_equal(self.spec, served, what=f"{self.kind} service at {self.url}, made for another robot")
            return link, Welcome(str(first["kind"]), first["spec"], first["model"], details)
        except (ProtocolError, SpecError):
            link.close()
            raise
        except (ValueError, KeyError, TypeError, TimeoutError, ConnectionClosed, OSError) as error:
            link.close()
            raise ProtocolError(f"{self.url}: expected a welcome of {SUBPROTOCOL}, got none: {error}") from error

    def _heartbeat(self) -> None:
        """Ping for as long as the session lives. The library's own keep-alive closes a dead connection too, but tells
        nobody before the next call, which then fails."""
        while not self._ending.wait(self._heartbeat_s):
            link = self._link
            if link is None:
                continue
            try:
                answered = link.ping()
            except (WebSocketException, OSError) as error:
                self._drop(link, str(error))
                continue
            until = time.monotonic() + self._heartbeat_s
            while link is self._link and not answered.wait(0.05):
                if time.monotonic() > until:
                    self._drop(link, f"no answer to a ping within {self._heartbeat_s:g} s")

    def _drop(self, link: ClientConnection, why: str) -> None:
        with self._lock:
            if self._link is not link:
                return
            self._link = None
            if self._closed or self._connecting:
                return
            self._connecting = True
        _log.warning("%s: connection dropped: %s; reconnecting", self.url, why)
        threading.Thread(target=self._reconnect, args=(link,), name="reconnect", daemon=True).start()

    def _reconnect(self, old: ClientConnection) -> None:
        old.close()  # waits for the other side, which is why it happens here
        delay, longest = self._backoff_s
        while not self._closed:
            try:
                link, welcome = self._connect()
            except Exception as error:  # whatever it is: a robot that stops trying never comes back
                _log.info("%s", error)
                time.sleep(delay * random.uniform(0.5, 1.0))  # a fleet must not come back in one instant
                delay = min(longest, 2 * delay)
                continue
            with self._lock:
                self._connecting = False
                if self._closed:
                    break
                self._link, self.welcome = link, welcome
                self.reconnects += 1
                self.clock.clear()
            _log.info("%s: connected again", self.url)
            return
        else:
            return
        link.close()


def served_spec(url: str, headers: Mapping[str, str] | None = None, *, proxy: str | None = None,
                tls_ca: Path | str | None = None) -> RobotSpec:  # fmt: skip
    """The robot spec that the service at `url` was made for, for who has no robot of its own. proxy, tls_ca: see
    `Session`. Raises ServiceError."""
    try:
        with connect(url, subprotocols=[SUBPROTOCOL], compression=None, proxy=configured_proxy(proxy),  # type: ignore[list-item]
                     additional_headers=dict(headers or {}), ssl=client_context(url, tls_ca),
                     close_timeout=0.2) as link:  # fmt: skip
            welcome = unpack(link.recv(timeout=5))
            return RobotSpec.from_json(welcome["spec"]["robot"])
    except (OSError, WebSocketException, KeyError, TypeError, ValueError) as error:
        raise ServiceError(
            f"{url}: expected a policy service speaking {SUBPROTOCOL}, got none: {error}; "
            f"{advice(url, error, 'policy service')}"
        ) from error


def configured_proxy(proxy: str | None = None) -> str | None:
    """`proxy`, else the one in RECAP_PROXY. What the system sets for browsers (HTTP_PROXY, ...) is ignored: robots talk
    to the next room, and a laboratory's proxy cannot reach it."""
    return proxy or os.environ.get(PROXY_VARIABLE) or None


def _note_clock(clock: ClockOffset, reply: Mapping[str, Any], sent: float, received: float) -> None:
    try:
        served = float(dict(reply.get("server_timing") or {}).get("total_ms", 0.0)) / 1e3
        clock.add(sent, received, served, float(reply["t_server"]))
    except (KeyError, TypeError, ValueError):
        return  # a reply without times: `ok`, a value, another's service


def _limit_sending(connection: ClientConnection, seconds: float) -> None:
    """`send` has no timeout of its own: without this, a service that stops reading blocks the robot for ever."""
    if sys.platform != "win32":
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
