"""The whole circle at its smallest size: every stage runs as its own command, and everything made fits together."""

import json

import pytest

from recap_model import cli
from recap_model.manifest import read_manifest, verify
from training.dataset import open_dataset
from training.labels import load_labels, load_returns, read_values
from training.presets import loop_debug

pytestmark = pytest.mark.timeout(1200)  # the fixture runs the whole circle


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop") / "run"
    assert cli.main(["loop", "--preset", "debug", "--out", str(folder)]) == 0
    return folder


def test_every_arm_is_evaluated_on_the_same_episodes(run):
    config = loop_debug.loop()
    description = json.loads((run / "loop.json").read_text())
    names = [(arm["name"], arm["beta"]) for arm in description["arms"]]
    assert names == [("sft", 1.0), *(("recap", beta) for beta in config.betas), ("imitation", 1.0)]
    scenes = set()
    for arm in description["arms"]:
        evaluation = json.loads((run / arm["folder"] / "evaluation.json").read_text())
        assert evaluation["overall"]["episodes"] == config.evaluation * len(config.tasks)
        scenes.add(tuple(sorted((row["task_name"], row["seed"]) for row in evaluation["episodes"])))
    assert len(scenes) == 1
    assert (run / "report.html").stat().st_size > 10_000


def test_every_folder_is_whole_and_names_the_one_it_was_made_from(run):
    for k in (0, 1):
        dataset = open_dataset(run / f"{k}/dataset")
        verify(run / f"{k}/dataset", "dataset")
        returns = load_returns(run / f"{k}/returns", dataset)
        values = read_values(run / f"{k}/values", dataset)
        critic = read_manifest(run / f"{k}/critic", "critic")
        assert critic.parents["returns"] == returns.hash and values.critic == critic.hash
    labels = load_labels(run / "1/advantage", dataset)
    assert set(labels.indicator) <= {0, 1} and len(labels.indicator) == dataset.frames
    assert (values.fold >= 0).all(), "every label must come from a critic that has not seen the episode"
    recap, imitation = (read_manifest(run / f"1/{name}", "policy") for name in ("recap", "imitation"))
    start = read_manifest(run / "0/sft", "policy").hash
    assert recap.parents == {"dataset": dataset.hash, "labels": labels.hash, "init": start}
    assert imitation.parents == {"dataset": dataset.hash, "init": start}


def test_iteration_1_holds_demonstrations_and_rollouts(run):
    config = loop_debug.loop()
    episodes = open_dataset(run / "1/dataset").episodes
    assert sum(e.demonstration for e in episodes) == config.demonstrations * len(config.tasks)
    assert sum(not e.demonstration for e in episodes) == config.rollouts * len(config.tasks)


def test_a_second_run_has_nothing_left_to_do(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")}
    assert cli.main(["loop", "--preset", "debug", "--out", str(run)]) == 0
    text = capsys.readouterr().out
    stages = json.loads((run / "loop.json").read_text())["stages"]
    assert text.count("already done") == len(stages)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")}
