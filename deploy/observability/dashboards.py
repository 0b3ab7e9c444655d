#!/usr/bin/env python3
"""Grafana dashboards from a short description: `deploy/observability/dashboards.py` rewrites dashboards/*.json."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).parent / "dashboards"
Unit = Literal["short", "s", "reqps", "ops", "percentunit", "bytes", "watt", "none"]
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT = 24, 8
_CHOSEN = '{instance=~"$instance"}'


@dataclass(frozen=True)
class Panel:
    """One picture. queries: PromQL -> legend. unit: Grafana's name of it. kind: what draws it. limit: a red line."""

    title: str
    queries: dict[str, str]
    unit: Unit = "short"
    about: str = ""
    kind: Literal["timeseries", "stat", "heatmap", "table"] = "timeseries"
    limit: float | None = None


@dataclass(frozen=True)
class Dashboard:
    """One page. rows: panels side by side. instances: the job whose instances can be chosen."""

    uid: str
    title: str
    about: str
    instances: str
    rows: tuple[tuple[Panel, ...], ...]


def _of(query: str, *labels: str, name: str = "") -> dict[str, str]:
    """A query whose lines are called by their labels (the job where none is given), and `name`."""
    shown = [f"{{{{{label}}}}}" for label in labels or (() if name else ("job",))]
    return {query: " ".join([*shown, *([name] if name else [])])}


def _rate(metric: str, by: str, where: str = "") -> str:
    selector = f'{{{where + ", " if where else ""}instance=~"$instance"}}'
    return f"sum by ({by}) (rate({metric}{selector}[$__rate_interval]))"


def _used_of(used: str, total: str, *labels: str, names: tuple[str, str] = ("used", "total")) -> dict[str, str]:
    """Two gauges of the same thing in one picture."""
    return _of(used + _CHOSEN, *labels, name=names[0]) | _of(total + _CHOSEN, *labels, name=names[1])


def _by(metric: str, *labels: str) -> dict[str, str]:
    """The rate of a counter, one line for each value of the labels."""
    return {_rate(metric, ", ".join(labels)): " ".join(f"{{{{{label}}}}}" for label in labels)}


def _quantiles(metric: str, *quantiles: float) -> dict[str, str]:
    """Of a histogram, all instances together."""
    return {f"histogram_quantile({q}, {_rate(metric + '_bucket', 'le')})": f"p{100 * q:g}" for q in quantiles}


def _stage(stage: str, quantile: float) -> str:
    buckets = _rate("recap_act_latency_seconds_bucket", "le", f'stage="{stage}"')
    return f"histogram_quantile({quantile}, {buckets})"


_LATENCY = {_stage("total", q): f"p{100 * q:g}" for q in (0.5, 0.95, 0.99)}
_STAGES = {_stage(stage, 0.95): stage for stage in ("decode", "queue", "infer", "encode")}
_BUCKETS = {_rate("recap_act_latency_seconds_bucket", "le", 'stage="total"'): "{{le}}"}
_ALERTS = {'count by (alertname) (ALERTS{alertstate="firing"}) or vector(0)': "{{alertname}}"}
_MODELS = {"recap_model_info": "{{instance}} {{model}} {{version}} {{hash}}"}
_CHANGES = f"sum by (action, result) (increase(recap_model_changes_total{_CHOSEN}[1h]))"
_BATCH = _rate("recap_act_batch_size_sum", "instance") + " / " + _rate("recap_act_batch_size_count", "instance")
_ALARMS = f"sum by (instance) (increase(recap_value_alarms_total{_CHOSEN}[10m]))"
_VIEWERS = 'recap_sessions{job="recap-critic", instance=~"$instance"}'

POLICY = Dashboard(
    "recap-policy",
    "RECAP: policy latency",
    "How long a robot waits for its next chunk, where the time goes, and what has no answer.",
    "recap-policy",
    (
        (
            Panel("Late or unanswered, 5 min", _of("job:recap_act_slow:ratio_rate5m"), "percentunit",
                  kind="stat", limit=0.01,
                  about="Of all requests; the objective is 1 % over 30 days."),
            Panel("Late or unanswered, 3 days", _of("job:recap_act_slow:ratio_rate3d"), "percentunit",
                  kind="stat", limit=0.01),
            Panel("Deadline misses", _of("job:recap_act_deadline:ratio_rate5m"), "percentunit",
                  kind="stat", limit=0.05),
            Panel("Alerts that fire", _ALERTS, "none", kind="stat", limit=1),
        ),
        (
            Panel("Latency", _LATENCY, "s", "From the request's last byte to its reply.", limit=0.05),
            Panel("p95 by stage", _STAGES, "s"),
            Panel("Distribution", _BUCKETS, "s", kind="heatmap"),
        ),
        (
            Panel("Requests by result", _by("recap_act_requests_total", "code"), "reqps"),
            Panel("Requests by protocol", _by("recap_act_requests_total", "dialect"), "reqps"),
            Panel("Replaced by a newer observation", _by("recap_act_superseded_total", "instance"), "reqps"),
        ),
        (
            Panel("Refused before their deadline", _by("recap_act_refused_deadlines_total", "when"), "reqps",
                  "Of the misses: refused at arrival, or in the queue, for they could not be met."),
            Panel("Steps from observation to action", _quantiles("recap_act_delay_steps", 0.5, 0.95), "none",
                  "Measured by robots."),
            Panel("Jump between chunks", _quantiles("recap_act_seam_error", 0.5, 0.95), "percentunit",
                  "Relative to the action's range, measured by robots."),
        ),
    ),
)  # fmt: skip

FLEET = Dashboard(
    "recap-fleet",
    "RECAP: fleet",
    "Replicas, their load, the models that they serve, who is refused and what is recorded.",
    "recap-policy",
    (
        (
            Panel("Up", _of('up{job=~"recap-.+|triton"}', "job", "instance"), "none",
                  "1 = its metrics can be read.", "stat"),
            Panel("Ready", _of("recap_ready", "job", "instance"), "none", "1 = it would answer requests.", "stat"),
            Panel("Sessions", _of("sum by (job, instance) (recap_sessions)", "job", "instance"), "none"),
            Panel("Models loaded", _MODELS, "none", kind="table"),
        ),
        (
            Panel("Engine's share of the time", _by("recap_engine_busy_seconds_total", "instance"), "percentunit",
                  "All models of a replica together.", limit=0.9),
            Panel("Waiting requests", _of(f"recap_act_queue_depth{_CHOSEN}", "instance"), "none"),
            Panel("Requests a run", _of(_BATCH, "instance"), "none"),
        ),
        (
            Panel("Answers by model", _by("recap_model_requests_total", "version", "hash", "role"), "reqps"),
            Panel("Model changes, 1 h", _of(_CHANGES, "action", "result"), "none"),
            Panel("Canary failures", _by("recap_canary_failures_total", "instance"), "reqps"),
        ),
        (
            Panel("Shadow: compared, failed, skipped", _by("recap_shadow_requests_total", "result"), "reqps"),
            Panel("Shadow: difference of actions", _quantiles("recap_shadow_action_difference", 0.5, 0.99),
                  "percentunit",
                  "Largest difference in a chunk, as a share of the action's range."),
            Panel("Unsafe chunks", _by("recap_act_unsafe_total", "kind"), "reqps"),
        ),
        (
            Panel("Refused callers", _of("sum by (reason) (rate(recap_refused_total[$__rate_interval]))",
                  "reason"), "reqps"),
            Panel("Recording", _by("recap_record_frames_total", "result"), "reqps"),
            Panel("To the critic", _by("recap_tap_observations_total", "result"), "reqps"),
        ),
    ),
)  # fmt: skip

VALUE = Dashboard(
    "recap-value",
    "RECAP: value monitoring",
    "How far each robot is, by the critic. The critic service's own page shows the same with pictures.",
    "recap-critic",
    (
        (
            Panel("Value", _of(f"recap_value{_CHOSEN}", "robot"), "none", "-1 (far) to 0 (success)."),
            Panel("Lowest values", _of(f"bottomk(10, recap_value{_CHOSEN})", "robot"), "none", kind="table"),
        ),
        (
            Panel("Alarms, 10 min", _of(_ALARMS, "instance"), "none"),
            Panel("Robots and viewers connected", _of(_VIEWERS, "instance"), "none"),
            Panel("Requests by result", _by("recap_value_requests_total", "code"), "reqps"),
        ),
        (
            Panel("Time to a value", _quantiles("recap_value_latency_seconds", 0.5, 0.95, 0.99), "s"),
            Panel("Share that fails", _of("job:recap_value_failed:ratio_rate5m"), "percentunit", limit=0.05),
        ),
    ),
)  # fmt: skip

_PARTS = ("queue", "compute_input", "compute_infer", "compute_output")
_REQUEST = {
    f"{_rate(f'nv_inference_{part}_duration_us', 'model')} / 1e6 / {_rate('nv_inference_request_success', 'model')}": (
        f"{{{{model}}}} {part}"
    )
    for part in _PARTS
}
_RUN = _rate("nv_inference_count", "model") + " / " + _rate("nv_inference_exec_count", "model")
_GPU_POWER = _used_of("nv_gpu_power_usage", "nv_gpu_power_limit", "gpu_uuid", names=("drawn", "limit"))

TRITON = Dashboard(
    "recap-triton",
    "RECAP: Triton",
    "Triton's own metrics. Those of GPUs need a GPU and `--allow-gpu-metrics`.",
    "triton",
    (
        (
            Panel("Requests", _by("nv_inference_request_success", "model", "version"), "reqps"),
            Panel("Failures", _by("nv_inference_request_failure", "model", "reason"), "reqps"),
            Panel("Waiting", _of(f"nv_inference_pending_request_count{_CHOSEN}", "model", "version"), "none"),
        ),
        (
            Panel("Mean time of a request", _REQUEST, "s"),
            Panel("Requests a run", _of(_RUN, "model"), "none"),
            Panel("Memory of the host", _used_of("nv_cpu_memory_used_bytes", "nv_cpu_memory_total_bytes"), "bytes"),
        ),
        (
            Panel("GPU memory", _used_of("nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes", "gpu_uuid"), "bytes"),
            Panel("GPU utilisation", _of(f"nv_gpu_utilization{_CHOSEN}", "gpu_uuid"), "percentunit"),
            Panel("GPU power", _GPU_POWER, "watt"),
        ),
    ),
)  # fmt: skip

DASHBOARDS = (POLICY, FLEET, VALUE, TRITON)


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.limit is not None:
        steps.append({"color": "red", "value": panel.limit})
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.limit is not None and panel.kind == "timeseries":
        defaults["custom"] = {"thresholdsStyle": {"mode": "line"}}
    shape = {"table": "table", "heatmap": "heatmap"}.get(panel.kind, "time_series")
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _DATASOURCE,
            "expr": query,
            "legendFormat": legend,
            "format": shape,
            "instant": panel.kind == "table",
            "range": panel.kind != "table",
        }
        for index, (query, legend) in enumerate(panel.queries.items())
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
    }


def _panels(rows: Sequence[Sequence[Panel]]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for line, row in enumerate(rows):
        width = _WIDTH // len(row)
        for column, panel in enumerate(row):
            place = {"x": column * width, "y": line * _HEIGHT, "w": width, "h": _HEIGHT}
            made.append(_panel(panel, len(made) + 1, place))
    return made


def _variables(job: str) -> list[dict[str, Any]]:
    query = f'label_values(up{{job="{job}"}}, instance)'
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "instance",
            "label": "Instance",
            "type": "query",
            "datasource": _DATASOURCE,
            "query": {"query": query, "refId": "instance"},
            "definition": query,
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".+",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def to_json(dashboard: Dashboard) -> str:
    """The dashboard as Grafana (10 and later) reads it from a file."""
    model = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["recap"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [
            {"type": "dashboards", "title": "RECAP", "tags": ["recap"], "asDropdown": True, "includeVars": False}
        ],
        "templating": {"list": _variables(dashboard.instances)},
        "panels": _panels(dashboard.rows),
    }
    return json.dumps(model, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Rewrite the folder; files of dashboards that are gone are removed."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard.uid}.json").write_text(to_json(dashboard))
    return 0


if __name__ == "__main__":
    sys.exit(main())
