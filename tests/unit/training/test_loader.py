import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_factory import TASKS, TOKENIZER, make_table
from recap_model import conditioning
from training.loader import Loader, Sampler, shift_images, split_episodes


def loader(table, **kw):
    return Loader(table, TOKENIZER, **{"chunk": 8, "dropout": 0.3, "shift": 2, "seed": 0, **kw})


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 3))
def test_an_epoch_visits_no_frame_twice(rows, batch_size, seed):
    sampler = Sampler(np.arange(rows), batch_size, seed)
    steps = rows // sampler.batch_size
    epoch = np.concatenate([sampler(step) for step in range(steps)])
    assert len(set(epoch)) == len(epoch) == steps * sampler.batch_size
    assert all(len(sampler(step)) == sampler.batch_size for step in range(3 * steps))


def test_batches_are_a_function_of_seed_and_step():
    table = make_table()
    rows = Sampler(np.arange(len(table)), 16, 0)(5)
    straight = loader(table)(rows, 5)
    fresh = Sampler(np.arange(len(table)), 16, 0)
    fresh(7)  # whatever was drawn before
    again = loader(table)(fresh(5), 5)
    for name in ("images", "state", "tokens", "token_mask", "actions", "valid", "target"):
        np.testing.assert_array_equal(getattr(straight, name), getattr(again, name))
    assert not np.array_equal(loader(table)(rows, 6).images, straight.images)


def test_chunks_stop_at_the_end_of_their_episode():
    table = make_table((5, 12))
    batch = loader(table)(np.array([3, 5, 16]), 0)
    assert batch.valid.sum(1).tolist() == [2, 8, 1]
    np.testing.assert_array_equal(batch.actions[0, :2], table.action[3:5])
    np.testing.assert_array_equal(batch.actions[0, 2:], np.repeat(table.action[4:5], 6, 0))
    np.testing.assert_array_equal(batch.actions[1], table.action[5:13])


def clauses(batch):
    vocabulary = TOKENIZER.tokenizer.get_vocab()
    return [1 if vocabulary["positive"] in ids else 0 if vocabulary["negative"] in ids else -1 for ids in batch.tokens]


def test_dropout_is_drawn_per_sample_and_only_in_training():
    table = make_table((400, 400))
    rows = np.arange(800)
    kept = loader(table, shift=0)(rows, 0, train=False)
    assert clauses(kept) == table.indicator.tolist()
    dropped = np.array(clauses(loader(table, shift=0)(rows, 0)))
    share = (dropped == -1).mean()
    assert 0.24 < share < 0.36
    present = dropped != -1
    np.testing.assert_array_equal(dropped[present], table.indicator[present])


def test_prompt_is_the_services_prompt():
    """A positive frame's tokens are those of the prompt a robot is served with."""
    table = make_table()
    rows = np.flatnonzero(table.indicator == 1)[:4]
    batch = loader(table)(rows, 0, train=False)
    for i, row in enumerate(rows):
        ids, mask = TOKENIZER(conditioning.positive_prompt(TASKS[table.task[row]]))
        np.testing.assert_array_equal(batch.tokens[i], ids)
        np.testing.assert_array_equal(batch.token_mask[i], mask)


def test_shift_moves_each_camera_by_at_most_the_limit():
    image = np.zeros((1, 1, 9, 9, 3), np.uint8)
    image[0, 0, 4, 4] = 255
    seen = set()
    for seed in range(60):
        y, x = np.argwhere(shift_images(image, 2, np.random.default_rng(seed))[0, 0, :, :, 0])[0]
        seen.add((int(y) - 4, int(x) - 4))
    assert seen <= {(y, x) for y in range(-2, 3) for x in range(-2, 3)} and len(seen) > 10
    assert shift_images(image, 0, np.random.default_rng(0)) is image


@given(st.integers(2, 40), st.floats(0.01, 0.9), st.integers(0, 5))
def test_split_is_by_whole_episodes(episodes, share, seed):
    train, held = split_episodes(np.repeat(np.arange(episodes), 3), share, seed)
    assert train and held and not train & held and train | held == set(range(episodes))


def test_no_rows_is_refused():
    with pytest.raises(ValueError, match="expected at least one frame, got none"):
        Sampler(np.arange(0), 4, 0)
