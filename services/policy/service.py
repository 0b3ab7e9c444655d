"""What the fronts share: the pipeline, the sessions, the counters, the tap."""

import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from recap_model.spec import PolicySpec, spec_to_json
from services.common.batcher import Batcher
from services.common.drain import Connections
from services.common.engine import Engine
from services.common.errors import Fault, ServiceError, fault_of
from services.common.logs import get_logger
from services.common.metrics import PolicyMetrics
from services.common.observation import Observation
from services.common.settings import Limits, PolicySettings, limits_for
from services.common.tap import CriticTap
from services.policy.pipeline import Chunk, PolicyPipeline, milliseconds
from services.policy.session import Session

log = get_logger("policy")


class PolicyService:
    """One model, many robots. Made before the event loop starts; `start` and `stop` belong to the app's lifespan."""

    def __init__(self, engine: Engine, settings: PolicySettings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = PolicyMetrics()
        self.connections = Connections()
        self.batcher = Batcher(engine, on_batch=self.metrics.batch_size.observe)
        self.pipeline = PolicyPipeline(engine, self.batcher, settings.beta)
        self.limits: Limits = limits_for(engine.spec.robot)
        self.tap: CriticTap | None = None
        self._names: set[int] = set()
        self._seeds = itertools.count()
        self.metrics.describe(engine.name, engine.version, engine.hash, engine.spec)

    @property
    def spec(self) -> PolicySpec:
        """What every model of this service is made for."""
        return self.pipeline.spec

    def start(self) -> None:
        if self.settings.critic_url is not None:
            self.tap = CriticTap(
                self.settings.critic_url,
                hz=self.settings.critic_hz,
                api_key=self.settings.api_key,
                count=lambda result: self.metrics.tap.labels(result).inc(),
            )

    def stop(self) -> None:
        self.batcher.close()
        if self.tap is not None:
            self.tap.close()
        self.engine.close()

    def not_ready(self) -> str | None:
        if self.connections.draining:
            return "shutting down"
        return None if (why := self.batcher.trouble) is None else f"the engine failed: {why}"

    def welcome(self) -> dict[str, Any]:
        """The first message of `recap.v1`, and the metadata frame of the openpi protocol."""
        model = {"name": self.engine.name, "version": self.engine.version, "hash": self.engine.hash}
        return {
            "type": "welcome",
            "protocol": "recap.v1",
            "kind": "policy",
            "spec": spec_to_json(self.engine.spec),
            "model": model,
            "beta": self.settings.beta,
            "conditioning": "positive",
        }

    @contextmanager
    def session(self, dialect: str) -> Iterator[Session]:
        """A session for the time of a connection, named after the lowest free number (`openpi-0`)."""
        number = next(n for n in itertools.count() if n not in self._names)
        self._names.add(number)
        self.metrics.sessions.inc()
        seed = self.settings.seed
        generator = np.random.default_rng(None if seed is None else [seed, next(self._seeds)])
        try:
            yield Session(f"{dialect}-{number}", dialect, generator)
        finally:
            self._names.discard(number)
            self.metrics.sessions.dec()

    @contextmanager
    def request(self, dialect: str) -> Iterator[None]:
        """Counts a request, its result and its failures, and holds a shutdown back until it is answered."""
        try:
            with self.connections.request():
                yield
        except Exception as error:
            fault = fault_of(error)
            self.metrics.count(dialect, fault.code)
            if fault.code == "internal":
                log.error(
                    "act failed", dialect=dialect, error=fault.message, exc_info=not isinstance(error, ServiceError)
                )
            raise
        self.metrics.count(dialect, "ok")

    async def act(self, session: Session, observation: Observation, **options: Any) -> Chunk:
        """The next chunk for a session: the one way to the model for every front. options: see `PolicyPipeline.act`."""
        return await self.pipeline.act(session, observation, **options)

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
        """What follows a reply that is on its way: histograms, and the critic's view of what the robot saw (its frames
        as they came). t_obs: by the robot's clock, None where the protocol has none."""
        self._measure(session, timing, received)
        self._show_critic(session, observation, seq=seq, t_obs=time.monotonic() if t_obs is None else t_obs)

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
        """Put a sent reply into the histograms."""
        total = time.perf_counter() - received
        stages = {stage: timing[f"{stage}_ms"] / 1000 for stage in ("decode", "queue", "infer")}
        stages |= {"encode": max(total - sum(stages.values()), 0.0), "total": total}
        for stage, seconds in stages.items():
            self.metrics.latency[stage].observe(seconds)
        session.last_total_ms = 1000 * total

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
        asyncio.get_running_loop().call_soon(self.tap.observe, message)  # after the reply is on its way

    def tell_critic(self, session: Session, message: Mapping[str, Any]) -> None:
        if self.tap is not None and session.forward:
            self.tap.event(message)

    def report(self, fault: Fault, dialect: str) -> None:
        """Log a caller's mistake, so that the operator sees it too."""
        log.warning("request refused", dialect=dialect, **fault.to_message())
