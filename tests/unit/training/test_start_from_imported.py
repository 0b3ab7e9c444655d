"""Going on from a checkpoint: which data it takes, and what an import makes of odd statistics and settings."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from recap_client.spec import SpecError
from recap_model.cli import main
from recap_model.normalize import NormStats
from recap_model.tokenizer import TextTokenizer, word_tokenizer
from trained import SPEC
from training.lerobot_processors import LerobotError, constant_state, has_needed, statistics_of
from training.table import TableSource


def source(robot=SPEC, tasks=("open it",)) -> TableSource:
    return TableSource(SimpleNamespace(tasks=tasks), robot, "")  # type: ignore[arg-type]


def checkpoint(tokenizer: TextTokenizer, robot=SPEC, **parameters: Any) -> Any:
    manifest = SimpleNamespace(parameters=parameters)
    return SimpleNamespace(spec=SimpleNamespace(robot=robot), tokenizer=tokenizer, manifest=manifest)


def test_a_byte_level_tokenizer_takes_any_new_task(tmp_path):
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    files = checkpoint(TextTokenizer(tokenizer, 48))
    assert source(tasks=("fold the towel", "open it")).known_robot(files, tmp_path).tasks == (
        *SPEC.tasks,
        "fold the towel",
    )


def test_a_vocabulary_of_words_takes_new_tasks_of_known_words_alone(tmp_path):
    files = checkpoint(word_tokenizer(("open the door", "close it"), 16), replace(SPEC, tasks=("close it",)))
    assert source(tasks=("close the door",)).known_robot(files, tmp_path).tasks == ("close it", "close the door")
    with pytest.raises(ValueError, match=r"got \['fold the towel'\] with the new words \['fold', 'towel'\]"):
        source(tasks=("fold the towel",)).known_robot(files, tmp_path)


def test_an_import_with_other_names_says_how_to_take_the_datasets(tmp_path):
    generic = replace(SPEC, state=tuple(replace(dim, name=f"state_{i}") for i, dim in enumerate(SPEC.state)))
    words = word_tokenizer(SPEC.tasks, 16)
    with pytest.raises(SpecError, match=r"spec.state differs.*`recap import-lerobot --dataset`"):
        source().known_robot(checkpoint(words, generic, format="lerobot"), tmp_path)
    with pytest.raises(SpecError) as ours:
        source().known_robot(checkpoint(words, generic), tmp_path)
    shorter = replace(SPEC, state=SPEC.state[:1])
    with pytest.raises(SpecError) as another:
        source().known_robot(checkpoint(words, shorter, format="lerobot"), tmp_path)
    assert not any("import-lerobot" in str(error.value) for error in (ours, another))


def test_the_large_preset_says_that_it_starts_from_nothing(tmp_path, capsys):
    command = ["train", "policy", "--preset", "smolvla_base", "--mode", "imitation", "--out", str(tmp_path / "x")]
    assert main([*command, "--dataset", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().out
    assert "random weights" in said and "`recap import-lerobot lerobot/smolvla_base`" in said


def test_a_state_that_never_moved_is_exported_with_the_scale_that_is_used_here():
    stats = NormStats.of(np.array([[0.5, 1.0], [0.5, 3.0]]))
    written = constant_state(stats, "mean_std", back=True)
    np.testing.assert_array_equal(written.std, [1.0, 1.0])
    for ours, theirs in zip(stats.affine("mean_std"), written.affine("mean_std"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert constant_state(stats, "mean_std") is stats


def test_statistics_that_are_not_finite_are_none():
    found = {"mean": np.zeros(2), "std": np.full(2, np.inf)}
    assert not has_needed(found, "mean_std") and has_needed({**found, "std": np.ones(2)}, "mean_std")
    with pytest.raises(LerobotError, match=r"action.std: expected 2 finite numbers.*give --dataset FOLDER"):
        statistics_of(found, "mean_std", 2, "action")


def test_settings_that_are_no_whole_numbers_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"type": "smolvla", "num_steps": "ten", "chunk_size": None}))
    assert main(["import-lerobot", str(tmp_path), "--out", str(tmp_path / "out"), "--fps", "30"]) == 2
    said = capsys.readouterr().err
    assert "config.json: expected whole numbers, got {'chunk_size': None, 'num_steps': 'ten'}" in said
