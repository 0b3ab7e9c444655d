"""pytest plugin: a skipped test fails the run unless it is on the list below, so that nothing goes quietly untested."""

import pytest

# node id prefix -> why it may be skipped where `make test` runs
ALLOWED: dict[str, str] = {
    "tests/deploy/test_k8s.py": "renders with kubectl, which is no Python package; a newcomer's machine may lack it",
}

_skipped: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped[report.nodeid] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skipped[report.nodeid] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)


def unexpected() -> dict[str, str]:
    """Skipped node ids that are not on the list, with pytest's reason."""
    return {node: reason for node, reason in _skipped.items() if not node.startswith(tuple(ALLOWED) or ("\0",))}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if unexpected() and session.exitstatus == pytest.ExitCode.OK and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for node, reason in unexpected().items():
        terminalreporter.write_line(f"SKIPPED WITHOUT LEAVE {node}: {reason}", red=True)
