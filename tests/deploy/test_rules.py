"""Alert rules: each has a severity, texts, a section of the runbook, and a case in which it fires and one in which it
does not; nothing names a metric that no service gives. What needs Prometheus's own tools is marked `slow`."""

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from observability_tools import OBSERVABILITY, TRITON_METRICS, tool
from repository_factory import build_repository
from service_harness import critic_server, fetch, policy_server
from services.common.errors import CODES
from services.common.metrics import LATENCY_BUCKETS_S, REFUSALS

DOCS = OBSERVABILITY.parents[1] / "docs"
RULE_FILES = sorted((OBSERVABILITY / "rules").glob("*.yml"))
TEST_FILES = sorted((OBSERVABILITY / "rules" / "tests").glob("*.yml"))
_WORDS = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')
# what is left of a query without its strings, grouping labels and label names: metrics, functions and operators
_LABELS = re.compile(r"\b(by|without|on|ignoring)\s*\([^)]*\)|\{[^}]*\}|\[[^\]]*\]")
_PROMQL = {
    "absent", "and", "avg_over_time", "bottomk", "count", "histogram_quantile", "increase", "offset", "or", "rate",
    "round", "sum", "unless", "vector", "m", "e6", "le",
}  # fmt: skip


@cache
def rules() -> tuple[dict[str, Any], ...]:
    loaded = [yaml.safe_load(path.read_text()) for path in RULE_FILES]
    return tuple(rule for file in loaded for group in file["groups"] for rule in group["rules"])


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDS = {rule["record"]: rule for rule in rules() if "record" in rule}


@cache
def cases() -> tuple[dict[str, Any], ...]:
    return tuple(test for path in TEST_FILES for test in yaml.safe_load(path.read_text())["tests"])


def alert_tests(name: str) -> list[dict[str, Any]]:
    return [test for case in cases() for test in case.get("alert_rule_test", ()) if test["alertname"] == name]


def names_in(query: str) -> set[str]:
    """The metrics of a PromQL query."""
    bare = _LABELS.sub(" ", _STRINGS.sub('""', query))
    return {word for word in _WORDS.findall(bare) if word not in _PROMQL and not re.fullmatch(r"e\d+", word)}


def dashboard_queries() -> list[str]:
    pages = [json.loads(path.read_text()) for path in (OBSERVABILITY / "dashboards").glob("*.json")]
    return [target["expr"] for page in pages for panel in page["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names on the pages of real services. A counter without a child has its family's name and _total."""
    models = build_repository(tmp_path_factory.mktemp("models"), models=("policy", "critic"))
    names: set[str] = set()
    with policy_server(models) as policy, critic_server(models) as critic:
        for service in (policy, critic):
            for family in text_string_to_metric_families(fetch(service.http("/metrics"))[1]):
                suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
                names |= {family.name + suffix for suffix in suffixes}
    return names


def test_every_alert_has_what_the_one_who_is_woken_needs() -> None:
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}", name


def test_names_of_rules_are_unique() -> None:
    assert len(ALERTS) + len(RECORDS) == len(rules())


def test_the_runbook_has_one_section_for_each_alert_and_no_other() -> None:
    headings = re.findall(r"^## (\w+)$", (DOCS / "runbook.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(ALERTS)


def test_every_section_of_the_runbook_says_meaning_looking_and_doing() -> None:
    sections = re.split(r"^## ", (DOCS / "runbook.md").read_text(), flags=re.MULTILINE)[1:]
    for section in sections:
        found = re.findall(r"^- \*\*(Means|Look|Do)\.\*\* \S", section, re.MULTILINE)
        assert found == ["Means", "Look", "Do"], section.splitlines()[0]


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_a_case_that_fires_and_one_that_does_not(name: str) -> None:
    fires = [test for test in alert_tests(name) if test["exp_alerts"]]
    silent = [test for test in alert_tests(name) if not test["exp_alerts"]]
    assert fires and silent, f"{name}: expected both cases in deploy/observability/rules/tests, got {alert_tests(name)}"


@pytest.mark.parametrize("name", RECORDS)
def test_every_recording_rule_has_a_value(name: str) -> None:
    tests = [test for case in cases() for test in case.get("promql_expr_test", ())]
    assert [test for test in tests if name in names_in(test["expr"]) and test["exp_samples"]], name


def test_every_rule_file_is_loaded_by_a_test_file() -> None:
    loaded = {Path(name).name for path in TEST_FILES for name in yaml.safe_load(path.read_text())["rule_files"]}
    assert loaded == {path.name for path in RULE_FILES}


def test_the_metrics_of_a_query_are_found() -> None:
    query = 'sum by (job, le) (rate(a_total{x="b", y=~"c(d)"}[5m])) / 1e6 > 3 and on() (up or e:f:g offset 10m)'
    assert names_in(query) == {"a_total", "up", "e:f:g"}


def test_rules_and_dashboards_name_only_metrics_that_there_are(scraped: set[str]) -> None:
    known = scraped | set(RECORDS) | TRITON_METRICS | {"up", "ALERTS"}
    for query in [rule["expr"] for rule in rules()] + dashboard_queries():
        assert names_in(query) <= known, (query, names_in(query) - known)


def test_latency_limit_is_a_bucket_of_the_service() -> None:
    limits = {float(limit) for rule in rules() for limit in re.findall(r'le="([\d.]+)"', rule["expr"])}
    assert limits and limits <= set(LATENCY_BUCKETS_S)


def test_codes_and_reasons_in_rules_are_those_of_the_services() -> None:
    known = {"code": {"ok", *CODES}, "reason": {*REFUSALS, "CANCELED"}, "kind": {"nonfinite", "limit"}}
    for rule in rules():
        for label, values in re.findall(r'\b(code|reason|kind)(?:=~|=|!=)"([^"]*)"', rule["expr"]):
            assert set(values.split("|")) <= known[label], rule


def test_alertmanager_names_alerts_that_there_are() -> None:
    config = yaml.safe_load((OBSERVABILITY / "alertmanager.yml").read_text())
    for inhibition in config["inhibit_rules"]:
        for matcher in inhibition["source_matchers"] + inhibition["target_matchers"]:
            pattern = re.fullmatch(r'alertname (?:=~|!=|=) "?([^"]+)"?', matcher)
            assert pattern is not None, matcher
            for part in re.split(r"\|(?![^(]*\))", pattern[1]):
                assert [name for name in ALERTS if re.fullmatch(part, name)], part


@pytest.mark.slow
@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_promtool_tests_pass(path: Path) -> None:
    done = subprocess.run([tool("promtool"), "test", "rules", path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_configurations_are_valid() -> None:
    for command in (
        ["promtool", "check", "config", "prometheus.yml"],
        ["promtool", "check", "rules", *(str(path) for path in RULE_FILES)],
        ["amtool", "check-config", "alertmanager.yml"],
    ):
        done = subprocess.run(
            [tool(command[0]), *command[1:]], cwd=OBSERVABILITY, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("severity", "receiver"), [("page", "on-call"), ("ticket", "tickets"), ("other", "tickets")])
def test_alerts_are_routed_by_severity(severity: str, receiver: str) -> None:
    command = [tool("amtool"), "config", "routes", "test", "--config.file", OBSERVABILITY / "alertmanager.yml"]
    done = subprocess.run([*command, f"severity={severity}"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, receiver), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("alert", ["RecapEngineDown", "RecapTwoModels"])
def test_a_rule_that_is_changed_fails_its_tests(alert: str, tmp_path: Path) -> None:
    """The cases are there for a reason: a rule that always fires, or never does, is found."""
    for folder, files in (("rules", RULE_FILES), ("rules/tests", TEST_FILES)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for file in files:
            (tmp_path / folder / file.name).write_text(file.read_text())
    service = tmp_path / "rules" / "service.yml"
    expression = ALERTS[alert]["expr"]
    for changed in (f"{expression.split(' > ')[0]} > 1e9", f"{expression.split(' > ')[0]} > -1"):
        service.write_text((OBSERVABILITY / "rules" / "service.yml").read_text().replace(expression, changed))
        command = [tool("promtool"), "test", "rules", tmp_path / "rules" / "tests" / "service.yml"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and alert in done.stdout + done.stderr
