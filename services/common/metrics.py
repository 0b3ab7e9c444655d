"""Prometheus metrics: the names, labels and buckets that dashboards and alerts are built on. Seconds are the unit."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from recap_model.spec import Spec

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
LATENCY_BUCKETS_S = tuple(ms / 1000 for ms in (1, 2, 5, 8, 10, 15, 20, 25, 33, 40, 50, 66, 100, 150, 250, 500, 1000))
STAGES = ("decode", "queue", "infer", "encode", "total")
DIALECTS = ("openpi", "roboarena", "recap.v1", "openvla", "lerobot", "groot")


class PolicyMetrics:
    """Metrics of one policy service, in a registry of their own so that two services can share a process."""

    def __init__(self) -> None:
        self.registry = _registry()
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
        self.batch_size = Histogram(
            "recap_act_batch_size",
            "Requests that shared one run of the engine",
            buckets=(1, 2, 4, 8),
            registry=self.registry,
        )
        self.superseded = Counter(
            "recap_act_superseded", "Requests replaced by a newer observation of their session", registry=self.registry
        )
        self.deadline_misses = Counter(
            "recap_act_deadline_misses", "Requests whose deadline passed before the answer", registry=self.registry
        )
        self.sessions = Gauge("recap_sessions", "Connected sessions", registry=self.registry)
        self.tap = Counter(
            "recap_tap_observations",
            "Observations for the critic: sent, dropped (newer one came, or "
            "the queue was full) or failed (critic not reachable)",
            ["result"],
            registry=self.registry,
        )
        self._info = model_info(self.registry)

    def describe(self, name: str, version: str, content_hash: str, engine_spec: Spec) -> None:
        describe_model(self._info, name, version, content_hash, engine_spec)

    def count(self, dialect: str, code: str) -> None:
        """One finished request; code "ok" or an error code."""
        self.requests.labels(dialect, code).inc()
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
        self._info = model_info(self.registry)

    def describe(self, name: str, version: str, content_hash: str, engine_spec: Spec) -> None:
        describe_model(self._info, name, version, content_hash, engine_spec)


def _registry() -> CollectorRegistry:
    # A creation time beside every counter would double the text and help nobody.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    return CollectorRegistry()


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
