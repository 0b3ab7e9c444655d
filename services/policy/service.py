"""What the fronts share: the pipeline, the sessions, the counters, the tap."""

import asyncio
import itertools
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from recap_model.spec import PolicySpec, spec_to_json
from services.common import tracing
from services.common.auth import Gate
from services.common.batcher import Batcher
from services.common.drain import Connections
from services.common.engine import Engine
from services.common.errors import Fault, ServiceError, fault_of
from services.common.logs import get_logger
from services.common.metrics import PolicyMetrics
from services.common.observation import Observation
from services.common.settings import Limits, PolicySettings, limits_for
from services.common.tap import CriticTap
from services.common.throttle import Throttle
from services.policy.chaining import Switched
from services.policy.models import Models
from services.policy.pipeline import Chunk, milliseconds
from services.policy.recorded import Ended, Judged, Served
from services.policy.session import Session

if TYPE_CHECKING:
    from services.policy.recording import ServiceRecorder

STATELESS = ("openvla",)
"""Dialects whose sessions are single requests: their recordings end by silence."""

log = get_logger("policy")


@dataclass(frozen=True)
class _Answer:
    """A chunk that is about to be sent, and what it was made by and with."""

    chunk: Chunk
    model: Mapping[str, str]
    options: Mapping[str, Any]


class PolicyService:
    """One model, many robots. Made before the event loop starts; `start` and `stop` belong to the app's lifespan."""

    def __init__(self, engine: Engine, settings: PolicySettings) -> None:
        self.settings = settings
        self.tracing = tracing.from_environment("recap-policy")
        self.metrics = PolicyMetrics()
        self.connections = Connections()
        self.models = Models(engine, settings, self.metrics)
        self.gate = Gate(
            settings.access,
            settings.api_key,
            lambda reason: self.metrics.refused.labels(reason).inc(),
            admin_key=None if settings.source is None else settings.source.admin_key,
        )
        self.limits: Limits = limits_for(engine.spec.robot)
        self.tap: CriticTap | None = None
        self._reported = Throttle()
        self._names: set[int] = set()
        self._seeds = itertools.count()
        self._served = itertools.count()
        self._answers: WeakKeyDictionary[Session, _Answer] = WeakKeyDictionary()
        self.recorder = _recorder(settings, self)

    @property
    def spec(self) -> PolicySpec:
        """What every model of this service is made for."""
        return self.models.live.pipeline.spec

    @property
    def engine(self) -> Engine:
        """Of the live model."""
        return self.models.live.engine

    @property
    def batcher(self) -> Batcher:
        """Of the live model."""
        return self.models.live.batcher

    def start(self) -> None:
        if self.settings.critic_url is not None:
            self.tap = CriticTap(
                self.settings.critic_url,
                hz=self.settings.critic_hz,
                api_key=self.settings.api_key,
                tls=self.settings.critic_tls,
                count=lambda result: self.metrics.tap.labels(result).inc(),
                judged=self._judged,
            )

    def stop(self) -> None:
        self.models.stop()
        if self.tap is not None:
            self.tap.close()
        if self.recorder is not None:
            self.recorder.close()
        if self.tracing is not None:
            self.tracing.close()

    def not_ready(self) -> str | None:
        if self.connections.draining:
            return "shutting down"
        return None if (why := self.batcher.trouble) is None else f"the engine failed: {why}"

    def welcome(self) -> dict[str, Any]:
        """The first message of `recap.v1`, and the metadata frame of the openpi protocol."""
        return {
            "type": "welcome",
            "protocol": "recap.v1",
            "kind": "policy",
            "spec": spec_to_json(self.engine.spec),
            "model": self.models.live.identity,
            "beta": self.settings.beta,
            "noise_scale": self.settings.noise_scale,
            "conditioning": "positive",
            "rtc": self.models.live.pipeline.rtc,
        }

    @contextmanager
    def session(self, dialect: str) -> Iterator[Session]:
        """A session for the time of a connection, named after the lowest free number (`openpi-0`)."""
        number = next(n for n in itertools.count() if n not in self._names)
        self._names.add(number)
        self.metrics.sessions.inc()
        seed = self.settings.seed
        generator = np.random.default_rng(None if seed is None else [seed, next(self._seeds)])
        session = Session(f"{dialect}-{number}", dialect, generator)
        try:
            yield session
        finally:
            if dialect not in STATELESS:
                self._ended(session, None, "disconnected")
            self._names.discard(number)
            self.metrics.sessions.dec()

    def request(self, dialect: str, received: float, sent: object = None) -> AbstractContextManager[None]:
        """Counts a request, its result and its failures, and holds a shutdown back until it is answered.

        received: `time.perf_counter` of its last byte. sent: the `traceparent` that came with it.
        """
        counted = self._counted(dialect)
        if self.tracing is None:
            return counted
        return self.tracing.request("act", dialect=dialect, received=received, sent=sent, around=counted)

    @contextmanager
    def _counted(self, dialect: str) -> Iterator[None]:
        try:
            with self.connections.request():
                yield
        except Exception as error:
            fault = fault_of(error)
            self.metrics.count(dialect, fault.code)
            if fault.code == "internal" and (more := self._reported.passes((dialect, "internal"))) is not None:
                untyped = not isinstance(error, ServiceError)
                log.error("act failed", dialect=dialect, error=fault.message, exc_info=untyped, **more)
            raise
        self.metrics.count(dialect, "ok")

    async def act(self, session: Session, observation: Observation, **options: Any) -> Chunk:
        """The next chunk for a session: the one way to the model for every front. options: see `PolicyPipeline.act`."""
        shadow = self.models.shadow_due()
        if options.get("seed") is None and (shadow or self.recorder is not None):
            # noise that can be made again: for the shadow, and for a recording that is replayed
            options["seed"] = int(session.generator.integers(2**31))
        chunk, slot = await self.models.act(session, observation, options)
        session.model = slot.identity
        if self.tracing is not None:
            self.tracing.note({"model.version": slot.engine.version, "model.hash": slot.engine.hash[:12]})
        if shadow:
            self.models.show_shadow(observation, options, chunk)
        if self.recorder is not None:
            self._answers[session] = _Answer(chunk, slot.identity, options)
        return chunk

    def answered(
        self,
        session: Session,
        observation: Observation,
        timing: Mapping[str, float],
        received: float,
        *,
        seq: int = 0,
        t_obs: float | None = None,
    ) -> None:
        """What follows a reply that is on its way: histograms, the critic's view of what the robot saw (its frames as
        they came), the recording. t_obs: by the robot's clock, None where the protocol has none. A front calls this in
        the same step of the event loop in which its `act` came back."""
        self._measure(session, timing, received)
        if self.tracing is not None:
            self.tracing.decoded(timing["decode_ms"] / 1000, {"robot": session.robot, "episode": session.episode})
        if self.recorder is not None:
            seq = next(self._served)  # the critic's answer carries it back
            self._record(self.recorder, session, observation, timing, t_obs=t_obs, number=seq)
        self._show_critic(session, observation, seq=seq, t_obs=time.monotonic() if t_obs is None else t_obs)

    def _record(
        self,
        recorder: "ServiceRecorder",
        session: Session,
        observation: Observation,
        timing: Mapping[str, float],
        *,
        t_obs: float | None,
        number: int,
    ) -> None:
        answer = self._answers.pop(session, None)
        if answer is None:
            return
        options = answer.options
        recorder.served(
            Served(
                key=_recording_key(session),
                robot=session.robot,
                episode=session.episode,
                dialect=session.dialect,
                t=time.monotonic(),
                t_obs=t_obs,
                number=number,
                seq=options.get("seq", 0),
                seed=options.get("seed"),
                images=observation.images,
                state=observation.state,
                prompt=observation.prompt,
                actions=answer.chunk.actions,
                model=answer.model,
                timing=timing,
                previous=options.get("previous"),
            )
        )

    def _judged(self, reply: Mapping[str, Any]) -> None:
        """A value from the critic; called from the tap's thread."""
        number, value = reply.get("seq"), reply.get("value")
        if self.recorder is not None and isinstance(number, int) and isinstance(value, float):
            self.recorder.judged(Judged(number, value))

    def _ended(self, session: Session, success: bool | None, reason: str) -> None:
        """An episode of a session is over."""
        self.models.boundary(session)
        if self.recorder is not None:
            self.recorder.ended(Ended(_recording_key(session), success, reason))

    def timing(self, chunk: Chunk, received: float, decode_ms: float) -> dict[str, float]:
        """`server_timing` of a reply about to be encoded. received: `time.perf_counter` of the request's last byte.

        `encode_ms` is what passed since the engine's answer; the time to send the bytes is only in the metrics.
        """
        total = milliseconds(received)
        queue, infer = 1000 * chunk.queue_s, 1000 * chunk.infer_s
        return {
            "decode_ms": decode_ms,
            "queue_ms": queue,
            "infer_ms": infer,
            "encode_ms": max(total - decode_ms - queue - infer, 0.0),
            "total_ms": total,
            "batch_size": float(chunk.batch),
        }

    def _measure(self, session: Session, timing: Mapping[str, float], received: float) -> None:
        """Put a reply into the histograms, after it is on its way."""
        total = time.perf_counter() - received
        session.last_total_ms = 1000 * total
        asyncio.get_running_loop().call_soon(self.metrics.replied, timing, total)

    def _show_critic(self, session: Session, observation: Observation, *, seq: int, t_obs: float) -> None:
        """Offer an answered observation to the critic, its frames as they came (JPEG stays JPEG)."""
        if self.tap is None or not session.forward:
            return
        cameras = self.engine.spec.robot.camera_names
        images = {name: observation.images[name] for name in cameras if name in observation.images}
        message = {
            "type": "observe",
            "seq": seq,
            "t_obs": t_obs,
            "robot": session.robot,
            "episode": session.episode,
            "act_latency_ms": session.last_total_ms,
            "observation": {"images": images, "state": observation.state, "prompt": observation.prompt},
        }
        if self.tracing is not None:
            message |= self.tracing.told()
        asyncio.get_running_loop().call_soon(self.tap.observe, message)  # after the reply is on its way

    def switched(self, switch: Switched | None) -> None:
        """Count what a robot measured when it went from one chunk to the next."""
        if switch is not None:
            self.metrics.chunk_delay.observe(switch.delay)
            if switch.seam is not None:
                self.metrics.seam_error.observe(switch.seam)

    def tell_critic(self, session: Session, message: Mapping[str, Any]) -> None:
        """What a robot says of its episode: a `reset` or an `outcome`. It ends the episode for models and recording."""
        if message["type"] == "outcome":
            success = message["success"]
            self._ended(session, success, {True: "success", False: "failure", None: "unknown"}[success])
        else:
            self._ended(session, None, "next_episode")
        if self.tap is not None and session.forward:
            self.tap.event(message)

    def report(self, fault: Fault, dialect: str) -> None:
        """Log a caller's mistake, so that the operator sees it too; of each dialect and code one a second."""
        if (more := self._reported.passes((dialect, fault.code))) is not None:
            log.warning("request refused", dialect=dialect, **fault.to_message(), **more)


def _recording_key(session: Session) -> Hashable:
    return session.dialect if session.dialect in STATELESS else id(session)


def _recorder(settings: PolicySettings, service: PolicyService) -> "ServiceRecorder | None":
    if settings.record is None:
        return None
    from services.policy.recording import ServiceRecorder  # mcap: only where something is recorded

    frames = service.metrics.record_frames
    return ServiceRecorder(settings.record, service.spec.robot, lambda result: frames.labels(result).inc())
