"""Who may call and how much: keys from a file and from the environment, quotas, and no web pages of strangers."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from urllib.parse import urlsplit

from services.common.errors import Fault, ServiceError
from services.common.keys import Key, KeyFileError, Scope, matching, read_keys, readable_by_others
from services.common.logs import get_logger
from services.common.quota import Clock, OverQuota, Usage, Usages
from services.common.settings import Access, Quota
from services.common.throttle import Throttle

WATCH_S = 0.25
_ENVIRONMENT, _ADMIN = "environment", "environment-admin"

log = get_logger("access")

Ending = Callable[[Fault], Awaitable[None]]


class Refused(ServiceError):
    """A caller that is not let in. reason: the label of the metric."""

    def __init__(self, reason: str, code: str, message: str) -> None:
        super().__init__(code, message)
        self.reason = reason


class Caller:
    """Who is behind a connection or a request. name: the key's id, or the address where no key is asked."""

    def __init__(self, gate: "Gate", name: str, key: Key | None, usage: Usage, scope: Scope) -> None:
        self.name = name
        self._gate, self._key, self._usage, self._scope = gate, key, usage, scope

    def check(self) -> None:
        """Raise Refused when the key has been revoked, has expired or has lost the scope since."""
        key = self._key
        if key is None:
            return
        current = self._gate.keys.get(key.id)
        if current is not key:  # the file was read again
            if current is None or current.sha256 != key.sha256:
                raise Refused("revoked", "unauthorized", f"key {key.id}: revoked")
            self._key, self._usage = current, self._gate.usages.of(current.id, self._gate.quota_of(current))
            _check_scope(current, self._scope)
        if (trouble := self._key.trouble(self._gate.wall()) if self._key else None) is not None:
            raise Refused(trouble, "unauthorized", f"key {key.id}: {trouble}")

    def spend(self, requests: int, size: int) -> None:
        """Count requests of `size` bytes together, before anything is made of them. Raises Refused, OverQuota."""
        with self._gate.counted(self.name):
            self.check()
            self._usage.spend(requests, size)

    @contextmanager
    def request(self) -> Iterator[None]:
        """While a request is being answered. Raises OverQuota."""
        with self._gate.entered(self.name, self._usage.request()):
            yield

    @contextmanager
    def session(self) -> Iterator[None]:
        """While a connection is open. Raises OverQuota, and ServiceError `unavailable` when the service is full."""
        with self._gate.entered(self.name, self._gate.room()), self._gate.entered(self.name, self._usage.session()):
            yield


class Gate:
    """Used on the event loop only. api_key, admin_key: of the operator, from the environment: for scopes `act` and
    `value`, and for `admin`; without a quota. refused: called with the reason of every refusal. wall: seconds since the
    epoch.

    Raises KeyFileError when the key file of `access` cannot be used.
    """

    def __init__(
        self,
        access: Access,
        api_key: str | None,
        refused: Callable[[str], None] = lambda _: None,
        *,
        admin_key: str | None = None,
        clock: Clock = time.monotonic,
        wall: Clock = time.time,
    ) -> None:
        self.access, self._refused = access, refused
        self._api_key, self._admin_key = api_key, admin_key
        self.wall = wall
        self.usages = Usages(clock)
        self._stamp = self._look()  # before the reading: a change in between is then seen later
        self.keys: Mapping[str, Key] = {} if access.keys is None else read_keys(access.keys)
        self._open: dict[object, tuple[Caller, Ending]] = {}
        self._sessions = 0
        self._said = Throttle(clock=clock)
        if access.keys is not None and readable_by_others(access.keys):
            log.warning("every account of this machine can read the key file", file=str(access.keys), fix="chmod 600")

    @property
    def asks(self) -> bool:
        """Whether callers need a key."""
        return self._api_key is not None or self.access.keys is not None

    def admit(self, headers: Mapping[str, str], peer: str, scope: Scope, *, query_key: str | None = None) -> Caller:
        """The caller that an HTTP request, a websocket or gRPC metadata (names in lower case) comes from.

        The key comes as `Authorization: Api-Key KEY` or `Bearer KEY`. query_key: from the address, for event streams
        alone: browsers cannot set their headers. Browsers always send `Origin` when a page opens a websocket or posts:
        a page from another host than this service must not drive a robot just because the operator's browser can reach
        it. Raises Refused.
        """
        with self.counted(peer):
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != headers.get("host"):
                raise Refused(
                    "origin", "unauthorized", f"Origin: expected a page of this service, got {origin[:100]!r}"
                )
        scheme, _, presented = headers.get("authorization", "").partition(" ")
        if scheme.lower() not in ("api-key", "bearer"):
            presented = query_key or ""
        return self.admit_key(
            presented.strip(), peer, scope, where="Authorization: expected `Api-Key KEY` or `Bearer KEY` with"
        )

    def admit_key(self, presented: str, peer: str, scope: Scope, *, where: str) -> Caller:
        """The caller that presents a key, which nothing is asked of when there is none. Raises Refused."""
        with self.counted(peer):
            if not self.asks and scope != "admin":
                return Caller(self, peer, None, self.usages.of(peer, self.access.quota), scope)
            key = matching(self.keys, presented)
            if key is not None:
                return self._holder(key, scope)
            if scope == "admin" and _equal(presented, self._admin_key):
                return self._operator(_ADMIN, scope)
            if not _equal(presented, self._api_key):
                raise Refused("unauthorized", "unauthorized", f"{where} a key of this service, got none or another")
            if scope == "admin":
                raise Refused("forbidden", "forbidden", "the shared key is for robots; expected a key of scope admin")
            return self._operator(_ENVIRONMENT, scope)

    def quota_of(self, key: Key) -> Quota:
        """A key's own quota, the service's when it has none."""
        return self.access.quota if key.quota == Quota() else key.quota

    @contextmanager
    def until_revoked(self, caller: Caller, end: Ending) -> Iterator[None]:
        """While a connection is open: `end` is called once with the reason when the caller's key is good no more."""
        token = object()
        self._open[token] = caller, end
        try:
            yield
        finally:
            self._open.pop(token, None)

    @contextmanager
    def room(self) -> Iterator[None]:
        """A place among all sessions of the service."""
        most = self.access.max_sessions
        if self._sessions >= most:
            raise Refused("full", "unavailable", f"{most} sessions are open; no room for another")
        self._sessions += 1
        try:
            yield
        finally:
            self._sessions -= 1

    @contextmanager
    def entered(self, name: str, context: AbstractContextManager[None]) -> Iterator[None]:
        """`context`, a refusal to enter it counted; what its block raises is none of ours."""
        with self.counted(name):
            context.__enter__()
        try:
            yield
        finally:
            context.__exit__(None, None, None)

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Counts a refusal, and logs each reason at most once a second: a stranger must not fill the log."""
        try:
            yield
        except (Refused, OverQuota) as error:
            self.note(error.reason, name, error.fault.message)
            raise

    def note(self, reason: str, name: str, message: str) -> None:
        """Count a refusal, and log it unless its reason was logged within this second."""
        self._refused(reason)
        if (more := self._said.passes(reason)) is not None:
            log.warning("caller refused", reason=reason, caller=name, message=message, **more)

    async def watch(self) -> None:
        """Follow the key file and end the sessions of keys that are good no more, until cancelled."""
        while True:
            await asyncio.sleep(WATCH_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Read the key file if it has changed, then end what must end. A file that is broken changes nothing."""
        if self.access.keys is not None and (stamp := self._look()) != self._stamp:
            self._stamp = stamp
            try:
                before, self.keys = self.keys, await asyncio.to_thread(read_keys, self.access.keys)
            except KeyFileError as error:
                log.error("the keys stay as they were", error=str(error))
            else:
                now = self.wall()
                good = [{name for name, key in keys.items() if not key.trouble(now)} for keys in (before, self.keys)]
                log.info("keys read again", added=sorted(good[1] - good[0]), gone=sorted(good[0] - good[1]))
        ended = []
        for token, (caller, end) in list(self._open.items()):
            try:
                with self.counted(caller.name):
                    caller.check()
            except ServiceError as error:
                self._open.pop(token, None)
                ended.append(end(error.fault))
        await asyncio.gather(*ended, return_exceptions=True)

    def _holder(self, key: Key, scope: Scope) -> Caller:
        if (trouble := key.trouble(self.wall())) is not None:
            raise Refused(trouble, "unauthorized", f"key {key.id}: {trouble}")
        _check_scope(key, scope)
        return Caller(self, key.id, key, self.usages.of(key.id, self.quota_of(key)), scope)

    def _operator(self, name: str, scope: Scope) -> Caller:
        return Caller(self, name, None, Usage(name, Quota()), scope)

    def _look(self) -> tuple[int, ...] | None:
        """What tells one state of the key file from another."""
        try:
            found = None if self.access.keys is None else self.access.keys.stat()
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


def address(peer: str) -> str:
    """The host of gRPC's `ipv4:1.2.3.4:5` or `ipv6:[::1]:5`, as HTTP has it; anything else unchanged."""
    kind, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    return host if kind in ("ipv4", "ipv6") else peer


def _check_scope(key: Key, scope: Scope) -> None:
    if scope not in key.scopes:
        got = ", ".join(key.scopes)
        raise Refused("forbidden", "forbidden", f"key {key.id}: expected the scope {scope}, got {got}")


def _equal(presented: str, key: str | None) -> bool:
    return key is not None and hmac.compare_digest(presented.encode("utf-8", "surrogatepass"), key.encode())
