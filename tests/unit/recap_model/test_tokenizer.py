import numpy as np
import pytest

from recap_model.conditioning import positive_prompt, prompt
from recap_model.tokenizer import PromptTooLong, TextTokenizer, word_tokenizer

TASKS = ("open the drawer", "press the button from above")


def test_every_prompt_of_its_tasks_is_known_and_distinct():
    tokenizer = word_tokenizer(TASKS, 16)
    texts = [prompt(task, indicator) for task in TASKS for indicator in (1, 0, -1)]
    assert all(tokenizer.unknown_words(text) == () for text in texts)
    rows = [tuple(tokenizer(text)[0]) for text in texts]
    assert len(set(rows)) == len(rows)


def test_padding_is_masked_and_case_is_folded():
    tokenizer = word_tokenizer(TASKS, 16)
    ids, mask = tokenizer(positive_prompt("Open the DRAWER"))
    assert mask.sum() == 8 and (ids[~mask] == 0).all() and (ids[mask] > 1).all()
    np.testing.assert_array_equal(ids, tokenizer(positive_prompt("open the drawer"))[0])


def test_unknown_words_are_named():
    tokenizer = word_tokenizer(TASKS, 16)
    assert tokenizer.unknown_words("please open the fridge") == ("please", "fridge")


def test_a_longer_task_widens_a_new_vocabulary_and_is_refused_by_an_old_one():
    long = " ".join(f"word{i}" for i in range(30))
    assert word_tokenizer((long,), 16).max_tokens == 35
    with pytest.raises(PromptTooLong, match="expected at most 16 tokens, got 35"):
        word_tokenizer(TASKS, 16)(positive_prompt(long))


def test_the_file_is_the_tokenizer(tmp_path):
    tokenizer = word_tokenizer(TASKS, 16)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json", 16)
    for task in TASKS:
        np.testing.assert_array_equal(loaded(positive_prompt(task))[0], tokenizer(positive_prompt(task))[0])
