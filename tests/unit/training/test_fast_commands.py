"""`recap fit-fast`, `recap train policy --fast --insulate`: from a dataset to a checkpoint that serves as any other."""

import json

import numpy as np
import pytest

from edited_datasets import write_dataset
from recap_model.cli import main
from recap_model.manifest import read_manifest, verify
from recap_model.policy.fast_tokenizer import load_fast
from recap_model.policy.load import load_policy
from recap_model.policy.static import GraphOptions, StaticPolicy
from recap_model.policy.weights import read_weights

TRAIN = ["train", "policy", "--mode", "imitation", "--preset", "debug", "--steps", "3", "--batch-size", "6"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """dataset/, fast/, plain/ (no action tokens), insulated/ (with them), further/ (from insulated/, with them)."""
    root = tmp_path_factory.mktemp("fast")
    dataset = str(write_dataset(root / "dataset", (9, 12, 10)))
    fit = ["fit-fast", dataset, "--chunk", "8", "--vocabulary", "128", "--scale", "8", "--out", str(root / "fast")]
    assert main(fit) == 0
    train = [*TRAIN, "--dataset", dataset, "--fast", str(root / "fast")]
    assert main([*TRAIN, "--dataset", dataset, "--out", str(root / "plain")]) == 0
    assert main([*train, "--insulate", "--out", str(root / "insulated")]) == 0
    init = ["--init", str(root / "insulated"), "--fast-weight", "0.5"]
    assert main([*train, *init, "--out", str(root / "further")]) == 0
    return root


def refused(capsys, *argv):
    capsys.readouterr()
    assert main(list(argv)) == 2
    return " ".join(capsys.readouterr().err.split())


def test_the_tokenizer_knows_its_data_and_says_how_well_it_does(run):
    manifest = verify(run / "fast", "fast")
    assert manifest.parameters["chunk"] == 8 and set(manifest.parents) == {"dataset"}
    assert 0 < manifest.metrics["tokens_per_chunk"] < manifest.metrics["numbers_per_chunk"] == 16
    assert manifest.metrics["rmse"] == pytest.approx(1 / 8 / np.sqrt(12), rel=0.15)
    fast = load_fast(run / "fast", horizon=8, action_dim=2)
    assert 64 < fast.vocabulary_size <= 128  # as many as there are runs that come twice
    assert fast.max_token - fast.min_token + 1 == manifest.metrics["coefficients"]


def test_the_checkpoint_loads_from_its_path_with_head_and_tokens(run):
    policy, files = load_policy(run / "insulated")
    place = json.loads((run / "insulated" / "fast" / "action_tokens.json").read_text())
    plain, count = load_policy(run / "plain")[0], load_fast(run / "fast").vocabulary_size
    assert place["first"] == plain.config.language.vocabulary and place["end"] == place["first"] + count
    assert policy.config.language.vocabulary == 8 * -(-(place["end"] + 1) // 8) and policy.config.language.head
    assert policy.language.head.weight.shape[0] == policy.language.embed.weight.shape[0] > place["end"]
    assert load_fast(run / "insulated" / "fast").to_json() == load_fast(run / "fast").to_json()
    manifest = verify(run / "insulated", "policy")
    assert manifest.parents["fast"] == place["tokenizer"] and manifest.metrics["fast_clamped"] == 0
    assert manifest.parameters["losses"]["insulate"] is True
    assert files.spec.chunk == 8


def test_going_on_keeps_the_place_of_the_tokens_and_what_was_learned(run):
    places = [json.loads((run / name / "fast" / "action_tokens.json").read_text()) for name in ("insulated", "further")]
    assert places[0] == places[1]
    before, after = (read_weights(run / name) for name in ("insulated", "further"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    change = (after["language.head.weight"] - before["language.head.weight"]).abs().max()
    assert 0 < change < 0.1  # trained on, not drawn anew


def test_without_the_flag_the_tokens_are_carried_along_and_stay_as_they_are(run, tmp_path):
    command = [
        *TRAIN,
        "--dataset",
        str(run / "dataset"),
        "--init",
        str(run / "insulated"),
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(command) == 0
    verify(tmp_path / "x", "policy")
    for name in ("tokenizer.json", "processor_config.json", "action_tokens.json"):
        assert (tmp_path / "x" / "fast" / name).read_bytes() == (run / "insulated" / "fast" / name).read_bytes()
    before, after = (read_weights(folder)["language.head.weight"] for folder in (run / "insulated", tmp_path / "x"))
    assert (before == after).all()


def test_the_graph_that_exporters_write_holds_no_head_and_is_otherwise_that_of_any_policy(run):
    """The embedding alone has more rows."""
    policies = [load_policy(run / name)[0] for name in ("plain", "insulated")]
    graphs = [StaticPolicy(policy, GraphOptions(guided=True)).state_dict() for policy in policies]
    assert graphs[0].keys() == graphs[1].keys() and not [name for name in graphs[1] if "head" in name]
    differing = {name for name, tensor in graphs[1].items() if tensor.shape != graphs[0][name].shape}
    assert differing == {"embedding"}
    assert [len(graph["embedding"]) for graph in graphs] == [p.config.language.vocabulary for p in policies]


def test_insulation_without_action_tokens_is_refused_with_what_to_do(run, tmp_path, capsys):
    base = [*TRAIN, "--dataset", str(run / "dataset"), "--out", str(tmp_path / "x")]
    said = refused(capsys, *base, "--insulate")
    assert "--insulate: expected --fast FOLDER with it, got none" in said and "would learn from nothing" in said
    assert "make a folder with `recap fit-fast`, or drop --insulate" in said
    assert "--fast-ids: expected --fast FOLDER with it, got 7 alone" in refused(capsys, *base, "--fast-ids", "7")
    fast = ["--fast", str(run / "fast")]
    assert "expected a language model that trains, got --train expert" in refused(
        capsys, *base, *fast, "--train", "expert"
    )
    assert "fast_weight: expected a positive weight, got 0.0" in refused(capsys, *base, *fast, "--fast-weight", "0")
    assert "expected tokenizer.json and processor_config.json" in refused(capsys, *base, "--fast", str(tmp_path))
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_that_has_learned_other_tokens_is_refused(run, tmp_path, capsys):
    fit = ["fit-fast", str(run / "dataset"), "--init", str(run / "plain"), "--scale", "9"]
    assert main([*fit, "--out", str(tmp_path / "fast")]) == 0
    assert set(read_manifest(tmp_path / "fast").parents) == {"dataset", "init"}
    base = [*TRAIN, "--dataset", str(run / "dataset"), "--init", str(run / "insulated"), "--out", str(tmp_path / "x")]
    said = refused(capsys, *base, "--fast", str(tmp_path / "fast"))
    assert f"expected the tokenizer that {run / 'insulated'} has learned, got another" in said
    said = refused(capsys, *base, "--fast", str(run / "insulated" / "fast"), "--fast-ids", "3")
    assert "where" in said and "has its action tokens, got 3; drop it" in said


def test_a_vocabulary_that_lerobot_makes_is_not_appended_to(run, tmp_path, capsys):
    folder = tmp_path / "imported"
    folder.mkdir()
    for path in (run / "plain").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parameters"]["vlm_name"] = "org/SmolVLM2"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    base = [*TRAIN, "--dataset", str(run / "dataset"), "--init", str(folder), "--out", str(tmp_path / "x")]
    said = refused(capsys, *base, "--fast", str(run / "fast"))
    count = load_fast(run / "fast").vocabulary_size + 1
    assert f"expected --fast-ids, the first of {count} ids that no prompt uses" in said and "org/SmolVLM2 has" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--chunk: expected the chunk length of the policy to train, got none"),
        (["--chunk", "0"], "--chunk: expected at least 1 action, got 0"),
        (["--chunk", "8", "--vocabulary", "4"], "expected at most 4 different coefficients"),
        (["--chunk", "6", "--init", "plain"], "--chunk: expected 8, the chunk length of"),
    ],
)
def test_fitting_says_what_it_lacks(run, tmp_path, capsys, options, said):
    options = [str(run / text) if text == "plain" else text for text in options]
    assert said in refused(capsys, "fit-fast", str(run / "dataset"), *options, "--out", str(tmp_path / "f"))
    assert not (tmp_path / "f").exists()
