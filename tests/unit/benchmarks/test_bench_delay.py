"""`benchmarks.delay`: what it concludes from results, and the whole of it on the simulated arm."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import delay
from recap_client.episode import EpisodeResult

MODELS = Path(__file__).parents[3] / "assets" / "model_repository"


def results(won: list[bool]) -> list[EpisodeResult]:
    return [
        EpisodeResult("t", "t", seed, "e", success, "x", 10, 0, 0, 0, 0, (0.1,), delays=(3, 2), seams=(0.1,))
        for seed, success in enumerate(won)
    ]


def test_a_pair_is_the_difference_on_the_same_scenes() -> None:
    random = np.random.default_rng(1)
    base = list(random.random(200) < 0.5)
    better = [won or number % 10 == 0 for number, won in enumerate(base)]
    arms = {"switch": base, "switch delayed": base, "rtc delayed": better}
    pairs = {(p["arm"], p["against"]): p for p in delay._pairs({name: results(won) for name, won in arms.items()})}
    assert set(pairs) == {("switch delayed", "switch"), ("rtc delayed", "switch"), ("rtc delayed", "switch delayed")}
    same = pairs["switch delayed", "switch"]
    assert same["low"] == same["difference"] == same["high"] == 0
    gain = pairs["rtc delayed", "switch"]
    assert gain["difference"] == pytest.approx(np.mean(better) - np.mean(base), abs=1e-4)
    assert 0 < gain["low"] < gain["difference"] < gain["high"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--realtime"]])
def test_the_whole_benchmark(capsys: Any, mode: list[str]) -> None:
    """With models that cannot continue a chunk: `rtc` is then the same as `switch`, action for action in lock step."""
    command = ["--models", str(MODELS), "--tasks", "drawer-open", "--episodes", "2", "--undelayed", "switch"]
    assert delay.main([*command, "--chunks", "switch", "rtc", *mode]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["arm"]: row for row in data["rows"]}
    assert list(rows) == ["switch", "switch delayed", "rtc delayed"]
    assert rows["switch delayed"]["delay_steps"] > rows["switch"]["delay_steps"]
    if not mode:
        named = ("arm", "chunks")
        plain, chained = ({k: v for k, v in rows[f"{c} delayed"].items() if k not in named} for c in ("switch", "rtc"))
        assert plain == chained and rows["switch"]["delay_steps"] == 0
