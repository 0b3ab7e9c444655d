"""Prometheus metrics: the names, labels and buckets that dashboards and alerts are built on. Seconds are the unit."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Protocol
from weakref import WeakSet

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from recap_model.spec import Spec

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
LATENCY_BUCKETS_S = tuple(ms / 1000 for ms in (1, 2, 5, 8, 10, 15, 20, 25, 33, 40, 50, 66, 100, 150, 250, 500, 1000))
STAGES = ("decode", "queue", "infer", "encode", "total")
DIALECTS = ("openpi", "roboarena", "recap.v1", "openvla", "lerobot", "groot")

REFUSALS = (
    "origin", "unauthorized", "revoked", "expired", "forbidden", "full", "rate", "bytes", "in_flight", "sessions",
    "connections", "slow",
)  # fmt: skip


class Queue(Protocol):
    """Where requests wait, such as a `Batcher`."""

    @property
    def depth(self) -> int: ...


class PolicyMetrics:
    """Metrics of one policy service, in a registry of their own so that two services can share a process."""

    def __init__(self) -> None:
        self.registry = _registry()
        self._requests()
        self._scheduling()
        self._callers()
        self._models()

    def _requests(self) -> None:
        latency = Histogram(
            "recap_act_latency_seconds",
            "Time from a request's last byte to its reply, by stage",
            ["stage"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.latency = {stage: latency.labels(stage) for stage in STAGES}
        self.requests = Counter(
            "recap_act_requests",
            "Requests for actions by protocol and result",
            ["dialect", "code"],
            registry=self.registry,
        )
        self._request = lru_cache(maxsize=256)(self.requests.labels)  # a look-up by labels costs more than the counting
        self.batch_size = Histogram(
            "recap_act_batch_size",
            "Requests that shared one run of the engine",
            buckets=(1, 2, 4, 8),
            registry=self.registry,
        )
        self.chunk_delay = Histogram(
            "recap_act_delay_steps",
            "Control steps from an observation to the first action of its chunk, as measured by robots",
            buckets=(0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50),
            registry=self.registry,
        )
        self.seam_error = Histogram(
            "recap_act_seam_error",
            "Jump of the action where one chunk follows another, relative to its range, as measured by robots",
            buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0),
            registry=self.registry,
        )
        self.unsafe = Counter(
            "recap_act_unsafe",
            "Chunks with actions that are not finite, or beyond the limits of the robot",
            ["kind"],
            registry=self.registry,
        )
        for kind in ("nonfinite", "limit"):
            self.unsafe.labels(kind)

    def _scheduling(self) -> None:
        self.superseded = Counter(
            "recap_act_superseded", "Requests replaced by a newer observation of their session", registry=self.registry
        )
        self.deadline_misses = Counter(
            "recap_act_deadline_misses", "Requests not answered within their deadline", registry=self.registry
        )
        self.refused_deadlines = Counter(
            "recap_act_refused_deadlines",
            "Of these, refused before the deadline passed, for it could not be met: seen at the request's arrival, or "
            "in the queue",
            ["when"],
            registry=self.registry,
        )
        for when in ("arrival", "queue"):
            self.refused_deadlines.labels(when)
        queue_depth = Gauge("recap_act_queue_depth", "Requests that wait for an engine", registry=self.registry)
        self._queues: WeakSet[Queue] = WeakSet()
        queue_depth.set_function(lambda: sum(queue.depth for queue in list(self._queues)))
        self.engine_busy = Counter(
            "recap_engine_busy_seconds", "Time that engines spent on batches, all models", registry=self.registry
        )

    def _callers(self) -> None:
        self.sessions = Gauge("recap_sessions", "Connected sessions", registry=self.registry)
        self.tap = Counter(
            "recap_tap_observations",
            "Observations for the critic: sent, dropped (newer one came, or "
            "the queue was full) or failed (critic not reachable)",
            ["result"],
            registry=self.registry,
        )
        self.refused = refusals(self.registry)
        self.record_frames = Counter(
            "recap_record_frames",
            "Requests for the recording: written, dropped (queue full), no_space, or failed",
            ["result"],
            registry=self.registry,
        )

    def _models(self) -> None:
        self.model_requests = Counter(
            "recap_model_requests",
            "Answers by the model that gave them, and what it was then: live, canary, previous",
            ["version", "hash", "role"],
            registry=self.registry,
        )
        self._model_request = lru_cache(maxsize=64)(self.model_requests.labels)
        self.model_changes = Counter(
            "recap_model_changes", "Models loaded, promoted, rolled back", ["action", "result"], registry=self.registry
        )
        self.canary_failures = Counter(
            "recap_canary_failures",
            "Requests that the live model answered, because the canary failed",
            registry=self.registry,
        )
        self.shadow_requests = Counter(
            "recap_shadow_requests",
            "Requests due for the shadow model: compared, failed, or skipped (it was busy)",
            ["result"],
            registry=self.registry,
        )
        self.shadow_difference = Histogram(
            "recap_shadow_action_difference",
            "Largest difference of a shadow chunk from the one sent, as a share of the action's range",
            buckets=(1e-6, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0),
            registry=self.registry,
        )
        self._info = model_info(self.registry)

    def describe(self, name: str, version: str, content_hash: str, engine_spec: Spec) -> None:
        describe_model(self._info, name, version, content_hash, engine_spec)

    def forget(self, name: str, version: str, content_hash: str, engine_spec: Spec) -> None:
        """A model is not loaded any more."""
        self._info.remove(name, version, content_hash[:12], engine_spec.family)

    def answered_by(self, version: str, content_hash: str, role: str) -> None:
        """One answer of a model. role: live, canary or previous."""
        self._model_request(version, content_hash[:12], role).inc()

    def watch(self, queue: Queue) -> None:
        """Count `queue` into the depth for as long as it lives; read when the metrics are asked for."""
        self._queues.add(queue)

    def replied(self, timing: Mapping[str, float], total: float) -> None:
        """The latency of a reply, by stage. timing: `decode_ms`, `queue_ms`, `infer_ms`; total: seconds, the rest of
        which is the encoding's."""
        decode, queue, infer = (timing[name] / 1000 for name in ("decode_ms", "queue_ms", "infer_ms"))
        stages = decode, queue, infer, max(total - decode - queue - infer, 0.0), total
        for stage, seconds in zip(STAGES, stages, strict=True):
            self.latency[stage].observe(seconds)

    def count(self, dialect: str, code: str) -> None:
        """One finished request; code "ok" or an error code."""
        self._request(dialect, code).inc()
        if code == "superseded":
            self.superseded.inc()
        elif code == "deadline":
            self.deadline_misses.inc()


class CriticMetrics:
    """Metrics of one critic service."""

    def __init__(self) -> None:
        self.registry = _registry()
        self.value = Gauge(
            "recap_value",
            "Latest value of the robot's episode, -1 (far) to 0 (success)",
            ["robot"],
            registry=self.registry,
        )
        self.alarms = Counter(
            "recap_value_alarms", "Alarms raised: the value has fallen, or has stopped rising", registry=self.registry
        )
        self.requests = Counter(
            "recap_value_requests", "Requests for a value by result", ["code"], registry=self.registry
        )
        self.latency = Histogram(
            "recap_value_latency_seconds",
            "Time from an observation to its value",
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.sessions = Gauge("recap_sessions", "Connected sessions", registry=self.registry)
        self.refused = refusals(self.registry)
        self._info = model_info(self.registry)

    def describe(self, name: str, version: str, content_hash: str, engine_spec: Spec) -> None:
        describe_model(self._info, name, version, content_hash, engine_spec)


def _registry() -> CollectorRegistry:
    # A creation time beside every counter would double the text and help nobody.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    return CollectorRegistry()


def refusals(registry: CollectorRegistry) -> Counter:
    """Callers and requests that were not let in, by one of a fixed set of reasons."""
    counter = Counter("recap_refused", "Callers and requests that were refused", ["reason"], registry=registry)
    for reason in REFUSALS:
        counter.labels(reason)
    return counter


def watch_readiness(registry: CollectorRegistry, ready: Callable[[], bool]) -> None:
    """Whether requests would be answered; asked when the metrics are."""
    gauge = Gauge("recap_ready", "Would requests be answered: 1 where /readyz says so", registry=registry)
    gauge.set_function(lambda: float(ready()))


def model_info(registry: CollectorRegistry) -> Gauge:
    return Gauge(
        "recap_model_info",
        "The model that is served; always 1",
        ["model", "version", "hash", "family"],
        registry=registry,
    )


def describe_model(gauge: Gauge, name: str, version: str, content_hash: str, spec: Spec) -> None:
    gauge.labels(name, version, content_hash[:12], spec.family).set(1)


def render(registry: CollectorRegistry) -> bytes:
    """The text exposition format."""
    return generate_latest(registry)
