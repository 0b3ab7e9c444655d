"""The soak's verdict can fail, each way that it should; and a short soak end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import soak
from repository_factory import build_repository

COUNTS = {"heartbeats": 60, "episodes": 5, "openpi requests": 9, "refused": 4, "left": 3}


def samples(rss=lambda _: 100.0, fds=lambda _: 20, threads=lambda _: 8, **counts: int) -> list[dict[str, Any]]:  # type: ignore[no-untyped-def]
    return [
        {
            "t": 5.0 * (i + 1),
            "processes": {"policy": {"rss_mib": rss(i), "fds": fds(i), "threads": threads(i)}},
            "counts": COUNTS | counts,
            "latency": {"heartbeat": {"n": 5, "max_ms": 3.0}},
        }
        for i in range(60)
    ]


def test_flat_passes_and_the_warm_up_does_not_count() -> None:
    report = soak.verdict(samples(rss=lambda i: 100.0 if i > 12 else 8.0 * i), [], 0.25)
    assert report["passed"] and report["memory_growth"] == {"policy": 0.0} and report["heartbeat_max_ms"] == 3.0


@pytest.mark.parametrize(
    "bad,fault",
    [
        ({"rss": lambda i: 100 + 0.2 * i}, "memory of policy: expected at most 5% growth"),
        ({"fds": lambda i: 20 + i // 5}, "fds of policy: expected"),
        ({"threads": lambda i: 8 + i // 5}, "threads of policy: expected 9 as at the start, got 16"),
        ({"missed heartbeats": 1}, "heartbeats: 1 of 60 missed"),
        ({"episodes": 0}, "episodes: expected some, got none"),
    ],
)
def test_what_it_fails_on(bad: dict[str, Any], fault: str) -> None:
    report = soak.verdict(samples(**bad), [], 0.1)
    assert not report["passed"] and report["faults"][0].startswith(fault)


def test_problems_of_the_load_and_too_few_samples_fail() -> None:
    assert soak.verdict(samples(), ["robot 0: lost a frame"], 0.1)["faults"] == ["robot 0: lost a frame"]
    assert soak.verdict(samples()[:4], [], 0.1)["faults"] == ["samples: expected 6 or more after the warm-up, got 4"]
    assert not soak.verdict([], [], 0.1)["passed"]


@given(st.floats(-0.5, 0.5), st.integers(7, 40), st.integers(0, 6))
def test_growth_is_that_of_the_line_whatever_one_sample_does(rise: float, count: int, spike: int) -> None:
    t = np.linspace(10, 100, count)
    line = 100 * (1 + rise * (t - t.mean()) / 90)
    assert soak.relative_growth(t, line) == pytest.approx(rise, abs=1e-9)
    noisy = line.copy()
    noisy[spike] *= 1.01
    assert soak.relative_growth(t, noisy) == pytest.approx(rise, abs=0.01)


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = build_repository(tmp_path / "models", models=["policy", "critic"])
    options = {"--minutes": 0.5, "--every": 1, "--robots": 2, "--openpi": 1, "--warm-up": 0.4, "--growth": 0.5,
               "--patience": 20, "--models": models, "--out": tmp_path / "out"}  # fmt: skip
    code = soak.main([str(part) for pair in options.items() for part in pair])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0 and report["passed"], report["faults"]
    assert report["exit"] == 0, "the services drained when told to"
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert len(lines) >= 10 and set(json.loads(lines[-1])["processes"]) == {"load", "policy", "critic"}
    assert (tmp_path / "out" / "soak.png").read_bytes().startswith(b"\x89PNG")
