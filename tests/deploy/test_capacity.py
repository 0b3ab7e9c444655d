"""The queueing model behind the capacity page: laws that hold for every load, and cases with a known answer."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.capacity import Engine, fleet, main, measured, parse_run_ms, robots_per_engine, simulate

ENGINE = Engine({1: 0.004, 2: 0.005, 4: 0.008, 8: 0.014}, overhead_s=0.0005)


def test_a_lone_robot_waits_for_nobody() -> None:
    load = simulate(ENGINE, 1, hz=10.0, seconds=5.0)
    assert load.p50_ms == load.p99_ms == 4.5
    assert (load.mean_batch, load.missed_share, load.requests_per_s) == (1.0, 0.0, 10.0)
    assert load.utilisation == pytest.approx(0.045, abs=0.001)


@settings(max_examples=8)
@given(
    robots=st.integers(1, 120), hz=st.floats(0.5, 30), overhead=st.floats(0, 0.002), spread=st.floats(0, 0.5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_no_load_beats_the_engine(robots: int, hz: float, overhead: float, spread: float, seed: int) -> None:
    engine = Engine(ENGINE.run_s, overhead)
    load = simulate(engine, robots, hz, 4.0, seed)
    assert load.requests_per_s <= min(engine.per_s, robots * hz) * 1.02 + robots / 3.2
    assert 1.0 <= load.mean_batch <= 8.0 and 0.0 <= load.utilisation <= 1.02
    assert 0.0 <= load.missed_share < 1.0 and load.p50_ms <= load.p99_ms
    assert load.p50_ms >= 1000 * (min(engine.run_s.values()) + overhead) - 0.001
    assert simulate(engine, robots, hz, 4.0, seed) == load
    noisy = simulate(Engine(engine.run_s, overhead, 0.0, spread), robots, hz, 4.0, seed)
    assert noisy.requests_per_s <= robots * hz + robots


def test_too_many_robots_fill_the_engine_and_miss_ticks() -> None:
    load = simulate(ENGINE, 200, hz=10.0, seconds=5.0)
    assert load.requests_per_s == pytest.approx(ENGINE.per_s, rel=0.05)
    assert load.mean_batch > 7.5 and load.utilisation > 0.98
    assert load.missed_share == pytest.approx(1 - ENGINE.per_s / 2000, abs=0.05)


def test_the_number_of_robots_is_the_largest_that_fits() -> None:
    best = robots_per_engine(ENGINE, hz=5.0, p99_ms=25.0, seconds=5.0)
    assert best.p99_ms <= 25.0 and best.missed_share <= 0.001
    more = simulate(ENGINE, best.robots + 1, 5.0, 5.0)
    assert more.p99_ms > 25.0 or more.missed_share > 0.001
    with pytest.raises(ValueError, match=r"got 4; it sees 4\.5 ms"):
        robots_per_engine(ENGINE, hz=5.0, p99_ms=4.0, seconds=5.0)


def test_a_fleet_puts_every_robot_somewhere() -> None:
    found = fleet(ENGINE, 1000, 50, hz=2.0, seconds=2.0)
    assert found["engines"] == 20 and found["fullest"] >= 50
    assert found["fullest_p99_ms"] >= found["even_p99_ms"] * 0.9


@pytest.mark.parametrize("text", ["", "1", "1=x", "2=3", "1=0", "0=1,1=1"])
def test_run_times_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--run-ms: expected"):
        parse_run_ms(text)


def test_run_times_and_a_window_without_requests() -> None:
    assert parse_run_ms("1=4,8=16") == {1: 0.004, 8: 0.016}
    with pytest.raises(ValueError, match=r"expected enough for a request of 0\.1 Hz"):
        simulate(ENGINE, 1, 0.1, 0.001)


def measured_run(robots: int) -> dict[str, object]:
    """As `benchmarks.fleet` prints it: an engine of 4 ms alone and 14 ms for eight, and 0.25 ms of the service."""
    return {
        "robots": robots, "hz": 2.0, "busy": 0.5, "engine": [{"batch": size} for size in (1, 2, 4, 8)],
        "at_rate": {"requests_per_s": 2.0 * robots, "mean_batch": 1.5, "p50_ms": {"median": 5.0},
                    "p99_ms": {"median": 9.0}, "missed_share": 0.0},
        "saturated": {"requests_per_s": 500.0, "engine_busy_share": 0.875, "mean_batch": 8.0},
        "saturated_batch_1": {"requests_per_s": 200.0, "engine_busy_share": 0.8, "mean_batch": 1.0},
    }  # fmt: skip


def test_the_engine_of_a_measured_run() -> None:
    engine = measured(measured_run(4))
    assert engine.run_s[1] == pytest.approx(0.004) and engine.run_s[8] == pytest.approx(0.014)
    assert engine.run_s[2] < engine.run_s[4] and engine.overhead_s == pytest.approx(0.00025)
    assert engine.per_s == pytest.approx(500.0)


def test_a_model_of_the_closed_loops_is_compared_with_the_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "fleet.txt"
    file.write_text("a table\n" + json.dumps(measured_run(60)) + "\n")
    assert main(["--check", str(file)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["check"]
    assert found["robots"] == found["model"]["robots"] == 60 and found["measured"]["mean_batch"] == 1.5
    assert found["model"]["requests_per_s"] == pytest.approx(120.0, rel=0.05)
    assert main(["--measured", str(file), "--seconds", "2", "--fleet", "100"]) == 0


def test_a_plan_says_how_many_engines_a_fleet_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--hz", "2", "--seconds", "2", "--fleet", "10", "10000"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    small, large = found["fleet"]
    assert small["engines"] == 1 and large["engines"] == -(-10000 // found["kept"])
