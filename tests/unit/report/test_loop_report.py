"""`recap report` on what a loop leaves: finished, interrupted, damaged."""

import json
from pathlib import Path

import numpy as np
import pytest

from recap_client.record import EpisodeInfo, Outcome, Recorder, StepRecord, read_rollout
from recap_client.robots.metaworld import metaworld_spec
from recap_client.runtime import EpisodeResult
from recap_model.manifest import write_manifest
from training.evaluate import statistics
from training.experiment.config import LoopConfig
from training.experiment.stages import describe
from training.report import build, main
from training.report_data import ReportError, against_baseline, known_values, read_run

CONFIG = LoopConfig("debug", ("drawer-open",), "debug", demonstrations=1, rollouts=1, evaluation=1)
SPEC = metaworld_spec()


def result(seed: int, success: bool, steps: int) -> EpisodeResult:
    reason = "success" if success else "timeout"
    return EpisodeResult(
        "open the drawer", "drawer-open", seed, f"e{seed}", success, reason, steps, 0, 0, 0, 0, (0.004,)
    )


def evaluation(folder: Path, steps: int, successes: int = 8) -> None:
    folder.mkdir(parents=True)
    results = [result(100 + i, i < successes, steps if i < successes else 62) for i in range(10)]
    (folder / "evaluation.json").write_text(json.dumps(statistics(results, 20.0)))


def rollout(path: Path, seed: int, *, success: bool, human: bool = False) -> None:
    info = EpisodeInfo(SPEC, "open the drawer", "drawer-open", seed, f"e{seed}")
    recorder = Recorder(path, info, wait=True)
    frame = np.full((64, 64, 3), seed, np.uint8)
    for step in range(6):
        value = -0.5 + 0.1 * step if step % 4 == 0 else None
        images, still = {"front": frame, "top": frame}, np.zeros(4, np.float32)
        recorder.step(StepRecord(step, step / 20, still, still, images, intervention=human and step > 3, value=value))
    assert recorder.close(Outcome(success, 6, "success" if success else "timeout")) is None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one iteration with everything that a report reads."""
    (tmp_path / "loop.json").write_text(json.dumps(describe(CONFIG, 1)))
    for name, steps in (("0/evaluation-sft", 40), ("1/evaluation-recap", 20), ("1/evaluation-recap-beta-1.75", 15),
                        ("1/evaluation-imitation", 30)):  # fmt: skip
        evaluation(tmp_path / name, steps)
    for seed, success, human in ((1, True, False), (2, False, False), (3, True, True)):
        rollout(tmp_path / f"1/rollouts/e{seed}.mcap", seed, success=success, human=human)
    row = {"task": "open the drawer", "demonstration": False, "success": False, "intervention": True, "episodes": 2,
           "frames": 10, "positive": 5, "negative": 5, "share": 0.5, "advantage": 0.1}  # fmt: skip
    audit = {"rows": [row], "sources": {}, "positive_share": 0.5, "failed_share": 0.4,
             "warnings": ["failed episodes supply 40% of the positives <careful>"]}  # fmt: skip
    (tmp_path / "1/advantage").mkdir()
    (tmp_path / "1/advantage/audit.json").write_text(json.dumps(audit))
    (tmp_path / "1/critic").mkdir()
    (tmp_path / "1/critic/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    write_manifest(tmp_path / "1/critic", "critic", metrics={"episodes": 4, "spearman": 0.812, "auc_50": None})
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/1-critic.json").write_text(json.dumps({"seconds": 61.0}))
    return tmp_path


def test_a_finished_run_has_every_section(run: Path) -> None:
    page = build(read_run(run))
    for title in ("Success and throughput", "Per task", "Values over episodes", "All values",
                  "Label audit, iteration 1", "Critics", "Latency", "Training", "Stages"):  # fmt: skip
        assert f"<h2>{title}</h2>" in page
    assert "&lt;careful&gt;" in page
    assert "human takeover" in page
    assert "0.812" in page
    assert f"{(8 * 30 + 2 * 62) / (8 * 20 + 2 * 62):.2f}x" in page  # RECAP without guidance over plain imitation


def test_throughput_is_compared_within_an_iteration_and_paired(run: Path) -> None:
    found = read_run(run)
    ratios = {arm.title: against_baseline(arm, found.arms) for arm in found.arms}
    assert ratios["0: imitation of the demonstrations"] is None  # other iteration: other data
    assert ratios["1: plain imitation, same data"] is None
    ratio = ratios["1: RECAP"]
    assert ratio is not None
    assert ratio[0] == pytest.approx((8 * 30 + 2 * 62) / (8 * 20 + 2 * 62))
    assert ratio[1] <= ratio[0] <= ratio[2]


def test_a_baseline_that_never_succeeds_gives_no_ratio(tmp_path: Path) -> None:
    (tmp_path / "loop.json").write_text(json.dumps(describe(CONFIG, 1)))
    evaluation(tmp_path / "1/evaluation-recap", 20)
    evaluation(tmp_path / "1/evaluation-imitation", 30, successes=0)
    found = read_run(tmp_path)
    assert against_baseline(found.arms[0], found.arms) is None
    assert build(found)


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "loop.json").write_text(json.dumps(describe(CONFIG, 1)))
    assert "stages finished" in build(read_run(tmp_path))


def test_damaged_rollouts_do_not_stop_the_report(run: Path) -> None:
    (run / "1/rollouts/e2.mcap").write_bytes(b"not a rollout")
    page = build(read_run(run))
    assert "value over 2 rollouts" in page


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"expected the folder of a loop \(with loop.json\)"):
        read_run(tmp_path)


def test_gaps_between_values_are_filled(run: Path) -> None:
    values = known_values(read_rollout(run / "1/rollouts/e1.mcap", images=False))
    assert np.allclose(values, [-0.5, -0.4, -0.3, -0.2, -0.1, -0.1])


def test_the_command_writes_beside_the_run(run: Path) -> None:
    assert main(["--run", str(run)]) == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
