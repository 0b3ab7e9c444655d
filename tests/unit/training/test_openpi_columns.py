"""Datasets with the columns of openpi forks (reward_label, value_label, adv_ind, intervention) go through unedited."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lerobot_v21 import write_v21
from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim
from recap_model import cli
from recap_model.manifest import read_manifest
from training.dataset import convert_v21, open_dataset
from training.dataset_writer import DatasetWriter, EpisodeData
from training.labels import load_labels, load_returns, outcomes

SPEC = RobotSpec("toy", (Camera("front", 32, 32),), (StateDim("x", "m"),), (ActionDim("dx", "1", -1.0, 1.0),), 20.0,
                 ("close it", "open it"))  # fmt: skip
LENGTHS = (80, 95, 160, 70, 160, 130, 60, 160)
WON = (True, True, False, True, False, True, True, False)
DEMONSTRATION = 6  # the whole episode a human's: nothing in it is compared
N, TOP = 50, 30


def columns_of(number, rng):
    """What the fork's converter and its value model write for one episode; penalty -1 at the end of a failure."""
    length, won = LENGTHS[number], WON[number]
    human = np.zeros(length, np.int64)
    human[slice(0, length) if number == DEMONSTRATION else slice(30, 30 + 10 * (number % 3))] = 1
    reward = np.full(length, -1 / length)
    reward[-1] = 0 if won else -1
    label = -np.arange(length - 1, -1, -1.0) / length if won else np.full(length, -1.0)
    return {
        "intervention": human,
        "reward_label": reward.astype(np.float32),
        "value_label": label.astype(np.float32),
        "vlm_value": np.clip(label + rng.normal(0, 0.1, length), -1, 0).astype(np.float32),
        "adv_ind": np.array(["positive" if number == DEMONSTRATION else "none"] * length, object),
    }


def stage_5(episodes):
    """The fork's relabelling: N-step advantage with V = 0 after the end, one percentile over all autonomous rollout
    frames, >= is positive, human frames positive, demonstrations left as they are. Written as the loops there are."""
    found = []
    for data in episodes:
        reward, value = data["reward_label"].astype(float), data["vlm_value"].astype(float)
        for t in range(len(value)):
            ahead = value[t + N] if t + N < len(value) else 0.0
            found.append(reward[t : t + N].sum() + ahead - value[t])
    human = np.concatenate([data["intervention"] for data in episodes]) > 0
    whole = np.concatenate([np.full(len(d["intervention"]), d["intervention"].all()) for d in episodes])
    before = np.concatenate([data["adv_ind"] for data in episodes])
    advantages = np.array(found)
    limit = np.percentile(advantages[~human & ~whole], 100 - TOP)
    computed = np.where(human | (advantages >= limit), "positive", "negative")
    return np.where(whole, before, computed), advantages


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """(dataset folder, columns of every episode): no outcome column, no manifest; adv_ind as stage 5 leaves it."""
    root = tmp_path_factory.mktemp("fork") / "dataset"
    root.mkdir()
    rng, episodes = np.random.default_rng(3), []
    with DatasetWriter(root, SPEC) as writer:
        for number, (length, won) in enumerate(zip(LENGTHS, WON, strict=True)):
            move = rng.uniform(-1, 1, (length, 1)).astype(np.float32)
            frames = {"front": rng.integers(0, 256, (length, 32, 32, 3), np.uint8)}
            writer.add(EpisodeData(SPEC.tasks[number % 2], move, move, frames, np.zeros(length, bool), False, won,
                                   np.zeros(length)))  # fmt: skip
            episodes.append(columns_of(number, rng))
    edit(root, {name: np.concatenate([data[name] for data in episodes]) for name in episodes[0]},
         drop=("success", "demonstration", "next.reward", "next.done", "intervention"))  # fmt: skip
    replace_column(root, "adv_ind", stage_5(episodes)[0])
    return root, episodes


def edit(root, columns, drop=()):
    """Add and drop columns of the only data file, with their features."""
    (path,) = (root / "data").glob("*/*.parquet")
    table = pq.read_table(path).replace_schema_metadata(None).drop_columns(list(drop))
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, path)
    info = json.loads((root / "meta" / "info.json").read_text())
    kinds = {name: "string" if values.dtype == object else str(values.dtype) for name, values in columns.items()}
    info["features"] = {name: feature for name, feature in info["features"].items() if name not in drop} | {
        name: {"dtype": kind, "shape": [1], "names": None} for name, kind in kinds.items()
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))


def replace_column(root, name, values):
    edit(root, {name: np.array(values, object if isinstance(values[0], str) else None)}, drop=(name,))


def label(root, out, *options):
    return cli.main(["label", "--dataset", str(root), "--out", str(out), *options])


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_the_fork_has_no_outcome_column_and_its_value_label_says_them(fork, tmp_path):
    dataset = open_dataset(fork[0])
    assert {episode.success for episode in dataset.episodes} == {None}
    assert outcomes(dataset) == list(WON)
    command = ["returns", "--dataset", str(fork[0]), "--out", str(tmp_path / "returns")]
    assert cli.main(command) == 0
    assert (load_returns(tmp_path / "returns", dataset).values[-160:] == -1).all()


def test_our_rule_with_their_options_gives_their_labels(fork, tmp_path):
    expected, advantages = stage_5(fork[1])
    options = ["--from-column", "vlm_value", "--reward-column", "reward_label", "--n", str(N), "--positive-fraction",
               str(TOP / 100), "--threshold-scope", "dataset", "--threshold-rule", "percentile"]  # fmt: skip
    assert label(fork[0], tmp_path / "out", *options, "--export-adv-ind", str(tmp_path / "adv_ind.parquet")) == 0
    written = pq.read_table(tmp_path / "adv_ind.parquet")
    assert written.column("adv_ind").to_pylist() == expected.tolist()
    assert written.column("episode_index").to_pylist() == np.repeat(range(len(LENGTHS)), LENGTHS).tolist()
    assert written.column("frame_index").to_pylist() == [t for length in LENGTHS for t in range(length)]
    got = load_labels(tmp_path / "out", open_dataset(fork[0]))
    np.testing.assert_allclose(got.advantage, advantages, atol=1e-9)
    assert {"positive", "negative"} == set(expected) and not list(tmp_path.glob("*.tmp"))


def test_our_own_options_differ_from_theirs(fork, tmp_path):
    """Otherwise the test above would say nothing about the options."""
    options = ["--from-column", "vlm_value", "--reward-column", "reward_label", "--positive-fraction", "0.3"]
    assert label(fork[0], tmp_path / "out", *options) == 0
    got = load_labels(tmp_path / "out", open_dataset(fork[0])).indicator
    assert (np.where(got == 1, "positive", "negative") != stage_5(fork[1])[0]).any()


def test_adv_ind_is_imported_as_it_is_and_written_back_the_same(fork, tmp_path):
    path = tmp_path / "adv_ind.parquet"
    assert label(fork[0], tmp_path / "out", "--from-column", "adv_ind", "--export-adv-ind", str(path)) == 0
    expected = stage_5(fork[1])[0]
    got = load_labels(tmp_path / "out", open_dataset(fork[0]))
    assert set(got.source) == {"imported"} and np.isnan(got.advantage).all()
    np.testing.assert_array_equal(got.indicator, np.where(expected == "positive", 1, 0))
    assert pq.read_table(path).column("adv_ind").to_pylist() == expected.tolist()
    manifest = read_manifest(tmp_path / "out")
    assert manifest.parameters == {"mode": "imported", "column": "adv_ind"} and set(manifest.parents) == {"dataset"}
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    won = np.repeat(WON, LENGTHS)
    assert audit["failed_share"] == pytest.approx(
        (~won & (expected == "positive")).sum() / (expected == "positive").sum()
    )
    assert {row["advantage"] for row in audit["rows"]} == {None}


def test_none_is_no_indicator_and_a_policy_trains_on_the_import(fork, tmp_path, capsys):
    root, _ = copied(fork, tmp_path)
    texts = ["none"] * LENGTHS[0] + ["positive"] * LENGTHS[1] + ["negative"] * sum(LENGTHS[2:])
    replace_column(root, "adv_ind", texts)
    assert label(root, tmp_path / "out", "--from-column", "adv_ind") == 0
    assert "9% of the frames have no indicator" in " ".join(capsys.readouterr().out.split())
    command = ["train", "policy", "--dataset", str(root), "--labels", str(tmp_path / "out"), "--preset", "debug"]
    assert cli.main([*command, "--steps", "1", "--batch-size", "4", "--out", str(tmp_path / "policy")]) == 0
    share = read_manifest(tmp_path / "policy").metrics["indicator_share"]
    assert [share[i] for i in ("-1", "1", "0")] == pytest.approx([n / len(texts) for n in (80, 95, 740)])


def copied(fork, folder):
    import shutil

    return shutil.copytree(fork[0], folder / "copy"), fork[1]


def test_a_v21_dataset_converted_by_lerobot_keeps_the_columns(fork, tmp_path):
    old = write_v21(open_dataset(fork[0]), tmp_path / "old")
    convert_v21(old, tmp_path / "new")
    assert label(tmp_path / "new", tmp_path / "out", "--from-column", "adv_ind") == 0
    got = load_labels(tmp_path / "out", open_dataset(tmp_path / "new")).indicator
    np.testing.assert_array_equal(got == 1, stage_5(fork[1])[0] == "positive")


def test_values_of_a_column_with_our_own_returns(fork, tmp_path):
    returns = tmp_path / "returns"
    assert cli.main(["returns", "--dataset", str(fork[0]), "--out", str(returns)]) == 0
    assert (
        label(fork[0], tmp_path / "out", "--from-column", "vlm_value", "--returns", str(returns), "--n", "episode") == 0
    )
    got, dataset = load_labels(tmp_path / "out", open_dataset(fork[0])), open_dataset(fork[0])
    np.testing.assert_array_equal(got.returns, load_returns(returns, dataset).values)
    np.testing.assert_allclose(got.advantage, got.returns - got.values)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.parameters["values_column"] == "vlm_value" and set(manifest.parents) == {"dataset", "returns"}
    assert any(
        "not known whether the critic behind 'vlm_value' trained" in text for text in manifest.metrics["warnings"]
    )


def test_the_training_target_as_values_is_warned_about(fork, tmp_path, capsys):
    assert label(fork[0], tmp_path / "out", "--from-column", "value_label", "--reward-column", "reward_label") == 0
    assert "against itself a success has no advantage anywhere" in " ".join(capsys.readouterr().out.split())
    won = np.repeat(WON, LENGTHS)
    np.testing.assert_allclose(load_labels(tmp_path / "out", open_dataset(fork[0])).advantage[won], 0, atol=1e-5)


class TestRefusals:
    def test_rewards_that_end_a_failure_with_zero(self, fork, tmp_path, capsys):
        root, episodes = copied(fork, tmp_path)
        reward = np.concatenate([data["reward_label"] for data in episodes])
        reward[np.cumsum(LENGTHS)[2] - 1] = 0
        replace_column(root, "reward_label", reward)
        assert label(root, tmp_path / "out", "--from-column", "vlm_value", "--reward-column", "reward_label") == 2
        text = said(capsys)
        assert "column 'reward_label': episode 2 failed and ends with reward 0: expected -1 or less there" in text
        assert "use --returns FOLDER" in text and not (tmp_path / "out").exists()

    @pytest.mark.parametrize("bad", ["Positive", "", "maybe"])
    def test_other_words(self, fork, tmp_path, capsys, bad):
        root, episodes = copied(fork, tmp_path)
        texts = np.concatenate([data["adv_ind"] for data in episodes])
        texts[LENGTHS[0] + 7] = bad
        replace_column(root, "adv_ind", texts)
        assert label(root, tmp_path / "out", "--from-column", "adv_ind") == 2
        expected = f"expected positive, negative or none, got {bad!r} at episode 1, frame 7 (1 such frames)"
        assert expected in said(capsys) and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("bad", "text"), [(0.5, "expected values in [-1, 0] (0 is success), got 0.5 in row 3"),
                                               (np.nan, "expected finite numbers, got 1 NaN")])  # fmt: skip
    def test_numbers_that_are_no_values(self, fork, tmp_path, capsys, bad, text):
        root, episodes = copied(fork, tmp_path)
        values = np.concatenate([data["vlm_value"] for data in episodes])
        values[3] = bad
        replace_column(root, "vlm_value", values)
        assert label(root, tmp_path / "out", "--from-column", "vlm_value", "--reward-column", "reward_label") == 2
        assert text in said(capsys)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ((), "expected --returns FOLDER and --values FOLDER; or --from-column NAME"),
            (("--from-column", "adv"), "column 'adv': expected one of ['action', 'adv_ind',"),
            (
                ("--from-column", "observation.state", "--values", "v"),
                "expected either --values FOLDER or --from-column",
            ),
            (("--from-column", "vlm_value"), "either --returns FOLDER or --reward-column NAME"),
            (
                ("--from-column", "adv_ind", "--reward-column", "reward_label"),
                "expected no --reward-column; leave it away",
            ),
            (
                ("--from-column", "observation.images.front"),
                "column 'observation.images.front': expected positive, neg",
            ),
        ],
    )
    def test_options_that_do_not_go_together(self, fork, tmp_path, capsys, options, text):
        assert label(fork[0], tmp_path / "out", *options) == 2
        assert text in said(capsys)
