"""The doctor tells the truth about this process, and a missing piece is a finding with a remedy."""

import json
import socket

import pytest

from recap_model import doctor


def test_every_finding_that_is_not_ok_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "attempt", lambda *_, **__: (False, "broken"))
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    checks = doctor.examine()
    assert [check.name for check in checks if not check.ok and not check.remedy] == []
    assert not doctor.serves(checks)


def test_a_child_that_dies_is_a_finding() -> None:
    ok, found = doctor.attempt("import os; os.abort()")
    assert not ok
    assert found


def test_a_child_that_hangs_is_a_finding() -> None:
    assert doctor.attempt("import time; time.sleep(60)", 0.5) == (False, "no answer within 0 s")


def test_serving_and_simulation_work_where_the_tests_run() -> None:
    trials = (doctor.check_python, doctor.check_packages, doctor.check_onnxruntime, doctor.check_rendering)
    assert [check for check in (trial() for trial in trials) if not check.ok] == []


def test_busy_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        monkeypatch.setattr(doctor, "DEMO_PORTS", (holder.getsockname()[1],))
        check = doctor.check_ports()
    assert not check.ok
    assert "recap serve all --policy-port" in check.remedy


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_exit_code_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ok: bool, code: int
) -> None:
    checks = [doctor.Check("rendering", doctor.DEMO, ok, "x", "y"), doctor.Check("cuda", doctor.GPU, False, "x", "y")]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    assert doctor.main(["--json"]) == code
    assert [item["name"] for item in json.loads(capsys.readouterr().out)] == ["rendering", "cuda"]
    assert doctor.main([]) == code
