"""`recap bench engine` end to end on a small model; the counted work against the known numbers of the full one."""

import json

import pytest

from benchmarks import engine
from benchmarks.roofline import Part, Roofline, floor_seconds, parts
from recap_model.policy.sizes import smolvla_base


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    arguments = ["--models", "smolvla_debug", "--engines", "lerobot", "onnxruntime"]
    table = root / "benchmarks.md"
    table.write_text("# Benchmarks\n\nAn introduction.\n\n## old\n")
    arguments += ["--repeats", "2", "--warm-up", "1", "--threads", "1", "--cache", str(root / "cache")]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *args, **_: lines.append(" ".join(map(str, args))))
        code = engine.main([*arguments, "--append", str(table)])
    return code, json.loads(lines[-1]), table.read_text()


@pytest.mark.slow
def test_every_engine_has_a_row_with_its_error(result):
    code, data, _ = result
    assert code == 0 and set(data) >= {"hardware", "rows"}
    measured = [row for row in data["rows"] if "p50_ms" in row]
    assert [r["engine"] for r in measured] == ["lerobot", "onnxruntime"]
    wanted = {"model", "engine", "batch", "cameras", "beta", "steps", "p50_ms", "p99_ms", "chunks_per_s"}
    for row in measured:
        assert set(row) >= wanted | {"roofline_share", "max_abs", "cosine", "memory_mb"}
        assert row["max_abs"] < 1e-4 and row["action_std"] > 0.1
    assert measured[0]["times_lerobot"] == 1.0 and measured[1]["times_lerobot"] > 0


@pytest.mark.slow
def test_the_table_goes_below_the_introduction(result):
    text = result[2]
    assert text.index("An introduction.") < text.index("engines, ") < text.index("## old")
    assert text.count("| smolvla_debug |") == 2


def test_work_of_the_full_model_is_what_others_counted():
    """GFLOP for two cameras at batch 1, counted independently: vision 431, prefix 54, ten steps 104."""
    work = {part.name: part.flops / 1e9 for part in parts(smolvla_base(2, 6, 6), 1, guided=False)}
    assert work["vision"] == pytest.approx(431, rel=0.02)
    assert work["prefix"] == pytest.approx(54, rel=0.1)
    assert work["denoise"] == pytest.approx(104, rel=0.05)


def test_floor_is_the_larger_of_computing_and_moving():
    limits = Roofline("toy", bandwidth=10.0, rate={"fp32": 100.0})
    assert floor_seconds((Part("a", 1000.0, 1.0, 0.0),), limits, "fp32") == 10.0
    assert floor_seconds((Part("b", 1.0, 100.0, 0.0),), limits, "fp32") == 40.0


def test_what_cannot_be_measured_says_so():
    row = {"model": "m", "engine": "lerobot", "batch": 1, "cameras": 1, "beta": 2.0, "not_measured": "no guidance"}
    assert "not measured: no guidance" in engine._line(row)
    rows = [row, {**row, "engine": "torch", "p50_ms": 1.0}]
    engine._compare(rows)
    assert all("times_lerobot" not in r for r in rows)


def test_an_engine_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        engine.main(["--engines", "magic"])
    assert stop.value.code == 2 and "invalid choice: 'magic'" in capsys.readouterr().err
