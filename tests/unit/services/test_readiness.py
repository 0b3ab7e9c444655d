"""`recap_ready` says what /readyz says, of both services, at any time."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service_harness import NativeClient, Served, act, critic_server, policy_server


def ready(served: Served) -> float:
    """Of the metrics, once it is the same as /readyz."""
    families = {family.name: family for family in text_string_to_metric_families(served.get("/metrics")[1])}
    (sample,) = families["recap_ready"].samples
    status, body = served.get("/readyz")
    assert (status == 200, json.loads(body)["ready"]) == (bool(sample.value),) * 2
    return float(sample.value)


@pytest.mark.parametrize(("serve", "kind"), [(policy_server, "act"), (critic_server, "observe")])
def test_the_gauge_is_the_probe(
    models: Path, serve: Callable[[Path], AbstractContextManager[Served]], kind: str
) -> None:
    with serve(models) as served, NativeClient(served.url("/value")) as client:
        message = {**act(served.engine.spec.robot), "type": kind}
        assert ready(served) == 1.0
        served.engine.failure = RuntimeError("no more memory")
        assert client.ask(message)["code"] == "internal"
        assert ready(served) == 0.0
        served.engine.failure = None
        assert client.ask(message)["type"] != "error"
        assert ready(served) == 1.0
