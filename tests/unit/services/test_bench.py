"""`recap bench` measures and says so in one line."""

import json
from pathlib import Path

import pytest

from services.cli import bench


def test_the_last_line_holds_the_numbers_side_by_side(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench(["--models", str(models), "--requests", "20", "--warm-up", "5"]) == 0
    result = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert result["requests"] == 20 and result["cameras"] == [["front", 16, 16], ["top", 16, 16]]
    for name in ("bare_engine_ms", "round_trip_ms", "added_ms"):
        assert result[name]["p50"] <= result[name]["p90"] <= result[name]["p99"]
    assert result["bare_engine_ms"]["p50"] > 0 and result["round_trip_ms"]["p50"] > 0
