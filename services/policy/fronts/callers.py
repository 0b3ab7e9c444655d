"""Sessions of robots whose protocol shows no beginning or end of a connection: made when first heard of, ended when
nothing has been heard for a while."""

import asyncio
import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass

from services.common.auth import Caller
from services.common.errors import ServiceError
from services.policy.service import PolicyService
from services.policy.session import Session

MOST = 256
IDLE_S = 60.0


@dataclass(eq=False)
class _Known[State]:
    state: State
    ending: ExitStack
    heard: float


class Callers[State]:
    """What is kept for each caller, by a key of the protocol. Used on the event loop only.

    busy: whether a caller must be kept although it is silent (a request of it is being answered).
    """

    def __init__(
        self,
        service: PolicyService,
        dialect: str,
        make: Callable[[Session], State],
        *,
        busy: Callable[[State], bool] = lambda _: False,
        idle_s: float = IDLE_S,
    ) -> None:
        self._service, self._dialect, self._make, self._busy, self._idle_s = service, dialect, make, busy, idle_s
        self._known: dict[Hashable, _Known[State]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, key: Hashable, caller: Caller) -> State:
        """The state of the robot `key`, a session of `caller`. Raises ServiceError `unavailable` when there are too
        many to take another, OverQuota when the caller has too many."""
        known = self._known.get(key)
        if known is None:
            self.forget_idle()
            if len(self._known) >= MOST:
                raise ServiceError("unavailable", f"{MOST} robots are connected by this protocol; no room for another")
            ending = ExitStack()
            ending.enter_context(caller.session())
            session = ending.enter_context(self._service.session(self._dialect))
            known = self._known[key] = _Known(self._make(session), ending, 0.0)
        known.heard = time.monotonic()
        return known.state

    def forget_idle(self) -> None:
        """End the sessions of callers that have gone silent."""
        limit = time.monotonic() - self._idle_s
        for key, known in list(self._known.items()):
            if known.heard <= limit and not self._busy(known.state):
                del self._known[key]
                known.ending.close()

    async def watch(self) -> None:
        """Forget idle callers from time to time, until cancelled."""
        while True:
            await asyncio.sleep(self._idle_s / 4)
            self.forget_idle()

    def close(self) -> None:
        """End every session."""
        for known in self._known.values():
            known.ending.close()
        self._known.clear()

    def states(self) -> list[State]:
        return [known.state for known in self._known.values()]
