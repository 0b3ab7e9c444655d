"""Which model answers whom: the live one, the one before it, and one on trial, as a canary or as a shadow.

A session keeps its model for an episode, so that no robot changes its mind in the middle of a movement; only a forced
change or the end of its model moves it, and then between two chunks.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from recap_client.spec import RobotSpec
from services.common.engine import Engine
from services.common.errors import ServiceError, fault_of
from services.common.logs import get_logger
from services.common.metrics import PolicyMetrics
from services.common.observation import Observation
from services.common.repository import versions_of
from services.common.settings import ModelSource, PolicySettings
from services.policy.pipeline import Chunk
from services.policy.session import Session
from services.policy.slots import Slot, load_beside, make_slot, policy_name, prove

State = Literal["shadow", "canary", "live"]
STATES: tuple[State, ...] = ("shadow", "canary", "live")

log = get_logger("models")


class ModelRefused(Exception):
    """A change of models that is not made; the models that serve are as before. status: of HTTP."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Wanted:
    """A model to load. path: a repository below the service's own, None = that; version: None = the highest. share: of
    episodes, for a canary. every: the shadow sees each so-manieth request."""

    state: State
    version: int | None = None
    path: str | None = None
    share: float = 0.1
    every: int = 10
    force: bool = False


@dataclass(frozen=True)
class _Trial:
    slot: Slot
    share: float = 0.0
    every: int = 1


@dataclass(frozen=True)
class _Pin:
    episode: tuple[str, str]
    slot: Slot


class Models:
    """The models of one service. Made before the event loop starts, used on it."""

    def __init__(self, engine: Engine, settings: PolicySettings, metrics: PolicyMetrics) -> None:
        self._settings, self._metrics = settings, metrics
        self.live = make_slot(engine, settings, metrics)
        self.previous: Slot | None = None
        self._canary: _Trial | None = None
        self._shadow: _Trial | None = None
        self._pins: WeakKeyDictionary[Session, _Pin] = WeakKeyDictionary()
        self._loading = False
        self._seen = 0
        self._shadow_task: asyncio.Task[None] | None = None
        self._describe(self.live)

    async def act(self, session: Session, observation: Observation, options: Mapping[str, Any]) -> tuple[Chunk, Slot]:
        """The chunk for a session and the model that gave it. A canary that fails is no robot's trouble: the live model
        answers, now and for the rest of the episode."""
        slot = self._choose(session)
        try:
            with slot.used():
                chunk = await slot.pipeline.act(session, observation, **options)
        except ServiceError as error:
            if self._canary is None or slot is not self._canary.slot or error.fault.code != "internal":
                raise
            log.error("the canary failed; the live model answers", version=slot.engine.version, error=str(error))
            self._metrics.canary_failures.inc()
            slot = self.live
            self._pins[session] = _Pin((session.robot, session.episode), slot)
            with slot.used():
                chunk = await slot.pipeline.act(session, observation, **options)
        self._metrics.answered_by(slot.engine.version, slot.engine.hash, self._role(slot))
        return chunk, slot

    def of(self, session: Session) -> Slot:
        """The model that answers a session's next request."""
        return self._choose(session)

    def boundary(self, session: Session) -> None:
        """An episode of this session begins or ends."""
        self._pins.pop(session, None)

    # shadow

    def shadow_due(self) -> bool:
        """Count a request; whether the shadow is to see it."""
        if self._shadow is None:
            return False
        self._seen += 1
        return self._seen % self._shadow.every == 0

    def show_shadow(self, observation: Observation, options: Mapping[str, Any], sent: Chunk) -> None:
        """Let the shadow answer what was answered already, with the same noise, and compare. One request at a time."""
        trial = self._shadow
        if trial is None or self._shadow_task is not None:
            self._metrics.shadow_requests.labels("skipped").inc()
            return
        same = {key: value for key, value in options.items() if key not in ("ticket", "deadline_s", "runs_out_s")}
        self._shadow_task = asyncio.create_task(self._compare(trial.slot, observation, same, sent))
        self._shadow_task.add_done_callback(self._shadow_done)

    async def _compare(self, slot: Slot, observation: Observation, options: dict[str, Any], sent: Chunk) -> None:
        session = Session("shadow", "internal", np.random.default_rng(0))
        try:
            with slot.used():
                chunk = await slot.pipeline.act(session, observation, **options)
        except Exception as error:
            self._metrics.shadow_requests.labels("failed").inc()
            log.warning("the shadow failed", version=slot.engine.version, error=fault_of(error).message)
            return
        self._metrics.shadow_requests.labels("compared").inc()
        self._metrics.shadow_difference.observe(difference(chunk.actions, sent.actions, slot.pipeline.spec.robot))

    def _shadow_done(self, _: "asyncio.Task[None]") -> None:
        self._shadow_task = None

    # changes

    async def load(self, wanted: Wanted) -> dict[str, Any]:
        """Load a model beside the others and give it its part. Raises ModelRefused; then nothing has changed."""
        source = self._settings.source
        if source is None:
            raise ModelRefused("this service was started without a model repository to load from", 404)
        if self._loading:
            raise ModelRefused("another model is being loaded; try again when it is there", 409)
        self._loading = True
        try:
            slot = await self._loaded_slot(source, wanted)
        finally:
            self._loading = False
        self._place(slot, wanted)
        return self.listing()

    async def _loaded_slot(self, source: ModelSource, wanted: Wanted) -> Slot:
        """A model that has answered once."""
        try:
            engine = await asyncio.to_thread(
                load_beside, source, self._settings.beta, wanted.path, wanted.version, self.live.engine
            )
            slot = make_slot(engine, self._settings, self._metrics)
        except Exception as error:
            raise ModelRefused(f"{type(error).__name__}: {error}") from error
        try:
            await prove(slot)
        except Exception as error:
            await asyncio.to_thread(slot.close)
            raise ModelRefused(f"a first request to the new model failed: {fault_of(error).message}") from error
        return slot

    def _place(self, slot: Slot, wanted: Wanted) -> None:
        self._describe(slot)
        if wanted.state == "live":
            self._make_live(slot, force=wanted.force)
        elif wanted.state == "canary":
            old, self._canary = self._canary, _Trial(slot, share=wanted.share)
            if wanted.force:
                self._pins.clear()
            self._retire(old)
        else:
            old, self._shadow = self._shadow, _Trial(slot, every=wanted.every)
            self._retire(old)

    def promote(self, state: str | None = None, *, force: bool = False) -> dict[str, Any]:
        """Make the canary (or the shadow, when there is no canary or `state` says so) the live model."""
        state = state or ("shadow" if self._canary is None else "canary")
        trial = self._canary if state == "canary" else self._shadow
        if trial is None:
            raise ModelRefused(f"no {state} is loaded; load one with state canary or shadow first", 409)
        if state == "canary":
            self._canary = None
        else:
            self._shadow = None
        self._make_live(trial.slot, force=force)
        return self.listing()

    def rollback(self) -> dict[str, Any]:
        """Undo the last change at once, in the middle of episodes too: end the canary when there is one, else make the
        previous model live. The model that was live stays loaded as the previous one."""
        if self._canary is not None:
            old, self._canary = self._canary, None
            self._retire(old)
        elif self.previous is not None:
            self.live, self.previous = self.previous, self.live
            self._pins.clear()
        else:
            raise ModelRefused("no canary is loaded and no previous model is kept: there is nothing to go back to", 409)
        return self.listing()

    def unload_shadow(self) -> dict[str, Any]:
        """End the shadow."""
        old, self._shadow = self._shadow, None
        if old is None:
            raise ModelRefused("no shadow is loaded", 409)
        self._retire(old)
        return self.listing()

    def listing(self) -> dict[str, Any]:
        """What is loaded, and the versions of the repository."""
        canary, shadow = self._canary, self._shadow
        return {
            "live": self.live.identity,
            "previous": None if self.previous is None else self.previous.identity,
            "canary": None if canary is None else canary.slot.identity | {"share": canary.share},
            "shadow": None if shadow is None else shadow.slot.identity | {"every": shadow.every},
            "loading": self._loading,
            "versions": self._versions(),
        }

    def stop(self) -> None:
        for slot in self._loaded():
            slot.close()

    def _make_live(self, slot: Slot, *, force: bool) -> None:
        """Sessions go on with the old one until their episode ends, which is why it must stay loaded."""
        oldest, self.previous, self.live = self.previous, self.live, slot
        if force:
            self._pins.clear()
        self._retire(None if oldest is None else _Trial(oldest))

    def _choose(self, session: Session) -> Slot:
        episode = (session.robot, session.episode)
        pin = self._pins.get(session)
        if pin is not None and pin.episode == episode and not pin.slot.retired:
            return pin.slot
        canary = self._canary
        slot = canary.slot if canary is not None and position(*episode) < canary.share else self.live
        self._pins[session] = _Pin(episode, slot)
        return slot

    def _role(self, slot: Slot) -> str:
        if slot is self.live:
            return "live"
        return "canary" if self._canary is not None and slot is self._canary.slot else "previous"

    def _retire(self, trial: _Trial | None) -> None:
        if trial is None or trial.slot in self._loaded():
            return
        engine = trial.slot.engine
        trial.slot.retire()
        if not any(slot.identity == trial.slot.identity for slot in self._loaded()):
            self._metrics.forget(engine.name, engine.version, engine.hash, engine.spec)

    def _loaded(self) -> list[Slot]:
        trials = [trial.slot for trial in (self._canary, self._shadow) if trial is not None]
        return [self.live, *([] if self.previous is None else [self.previous]), *trials]

    def _describe(self, slot: Slot) -> None:
        engine = slot.engine
        self._metrics.describe(engine.name, engine.version, engine.hash, engine.spec)

    def _versions(self) -> list[int]:
        source = self._settings.source
        folder = None if source is None else Path(source.models) / policy_name(self._settings.beta)
        return versions_of(folder) if folder is not None and folder.is_dir() else []


def position(robot: str, episode: str) -> float:
    """Where an episode stands between 0 and 1: always the same for the same names, on every replica."""
    digest = hashlib.sha256(f"{robot}\0{episode}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64


def difference(ours: NDArray[np.float32], theirs: NDArray[np.float32], robot: RobotSpec) -> float:
    """Largest difference of two chunks [T, A], each dimension as a share of its range (1 where it has none)."""
    span = np.array([dim.high - dim.low for dim in robot.action], np.float64)
    span[~np.isfinite(span)] = 1.0
    return float((np.abs(ours.astype(np.float64) - theirs) / span).max())
