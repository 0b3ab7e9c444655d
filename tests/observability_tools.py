"""Prometheus and Alertmanager as real processes on loopback, and the lists that queries are checked against.

The programs are those of `scripts/prometheus-tools`: in the folder named by RECAP_PROMETHEUS_TOOLS, else in the user's
cache.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from service_harness import eventually, fetch
from triton_server import free_ports

OBSERVABILITY = Path(__file__).parents[1] / "deploy" / "observability"

TRITON_METRICS = {
    "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count", "nv_inference_exec_count",
    "nv_inference_request_duration_us", "nv_inference_queue_duration_us", "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us", "nv_inference_compute_output_duration_us",
    "nv_inference_pending_request_count", "nv_pinned_memory_pool_total_bytes", "nv_pinned_memory_pool_used_bytes",
    "nv_cpu_utilization", "nv_cpu_memory_total_bytes", "nv_cpu_memory_used_bytes", "nv_gpu_utilization",
    "nv_gpu_memory_total_bytes", "nv_gpu_memory_used_bytes", "nv_gpu_power_usage", "nv_gpu_power_limit",
    "nv_energy_consumption",
}  # fmt: skip
"""As Triton's documentation names them (docs/user_guide/metrics.md); counters have no `_total`."""


def tool(name: str) -> str:
    """The path of prometheus, promtool, alertmanager or amtool."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = Path(os.environ.get("RECAP_PROMETHEUS_TOOLS", cache / "recap" / "prometheus")) / "bin"
    assert (folder / name).is_file(), f"{folder / name}: not there; make it with scripts/prometheus-tools"
    return str(folder / name)


class Receiver:
    """A webhook: keeps what Alertmanager delivers, by path, and refuses a caller without the token."""

    def __init__(self, token: str) -> None:
        self.delivered: list[tuple[str, dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                good = self.headers["Authorization"] == f"Bearer {token}"
                if good:
                    outer.delivered.append((self.path, body))
                self.send_response(200 if good else 401)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def alerts(self, name: str, status: str = "firing") -> list[tuple[str, dict[str, Any]]]:
        """Path and alert for each delivery of `name`."""
        return [
            (path, alert)
            for path, body in list(self.delivered)
            for alert in body["alerts"]
            if (alert["labels"]["alertname"], alert["status"]) == (name, status)
        ]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Prometheus:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(parameters)}"
        status, body = fetch(url)
        assert status == 200, (path, parameters, body)
        return json.loads(body)["data"]

    def query(self, query: str) -> list[dict[str, Any]]:
        """The samples of an instant query."""
        return list(self.get("/api/v1/query", query=query)["result"])

    def unhealthy(self) -> list[dict[str, Any]]:
        """Rules whose last evaluation failed."""
        groups = self.get("/api/v1/rules")["groups"]
        return [rule for group in groups for rule in group["rules"] if rule["health"] == "err"]


@contextmanager
def process(command: list[str], log: Path, ready: str) -> Iterator[None]:
    """A program in a group of its own, from the time that `ready` answers 200."""
    with log.open("ab") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)

    def answers() -> bool:
        assert child.poll() is None, log.read_text()[-3000:]
        try:
            return fetch(ready)[0] == 200
        except OSError:
            return False

    try:
        eventually(answers, 60)
        yield
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait(20)


@contextmanager
def monitoring(folder: Path, targets: Mapping[str, int], receiver: Receiver, token: Path) -> Iterator[Prometheus]:
    """Prometheus and Alertmanager on the configuration of the repository, of which only addresses and the token's path
    are replaced. targets: job -> port."""
    web, alerts = free_ports(2)
    shutil.copytree(OBSERVABILITY / "rules", folder / "rules", ignore=shutil.ignore_patterns("tests"))
    shutil.copy(OBSERVABILITY / "prometheus.yml", folder)
    for name, groups in {
        "targets": [{"targets": [f"127.0.0.1:{port}"], "labels": {"job": job}} for job, port in targets.items()],
        "alertmanagers": [{"targets": [f"127.0.0.1:{alerts}"]}],
    }.items():
        (folder / name).mkdir()
        (folder / name / "test.yml").write_text(json.dumps(groups))
    config = (OBSERVABILITY / "alertmanager.yml").read_text()
    for old, new in {
        "alert-receiver:9095": f"127.0.0.1:{receiver.port}",
        "/run/secrets/alert_webhook_token": str(token),
    }.items():
        assert old in config
        config = config.replace(old, new)
    (folder / "alertmanager.yml").write_text(config)
    alertmanager = [
        tool("alertmanager"), f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'alertmanager'}", f"--web.listen-address=127.0.0.1:{alerts}",
        "--cluster.listen-address=",
    ]  # fmt: skip
    prometheus = [
        tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{web}",
    ]  # fmt: skip
    with (
        process(alertmanager, folder / "alertmanager.log", f"http://127.0.0.1:{alerts}/-/ready"),
        process(prometheus, folder / "prometheus.log", f"http://127.0.0.1:{web}/-/ready"),
    ):
        yield Prometheus(web)
