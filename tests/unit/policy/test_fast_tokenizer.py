"""FAST: only rounding loses anything, least of all signs; what cannot be encoded or decoded is an error, not zeros."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.fft import dct, idct
from tokenizers import ByteLevelBPETokenizer, trainers

from recap_model.policy.fast_tokenizer import FastTokenError, cosine_basis, fit_fast, load_fast

HORIZON, DIMS = 20, 7
CHUNKS = np.cumsum(np.random.default_rng(0).normal(size=(200, HORIZON, DIMS)) * 0.12, axis=1)


@pytest.fixture(scope="module")
def fast():
    return fit_fast(CHUNKS, span=(-250, 250), vocabulary=768)


def published(folder, chunks=CHUNKS, scale=10, vocabulary=1024, **changes):
    """A folder as the published class fits and saves it (arXiv 2501.09747 and its code, re-written from its rules)."""
    values = np.around(dct(chunks, axis=1, norm="ortho") * scale).astype(int)
    low, high = int(values.min()), int(values.max())
    texts = ["".join(map(chr, row)) for row in (values - low).reshape(len(chunks), -1)]
    bpe = ByteLevelBPETokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, show_progress=False, special_tokens=[], max_token_length=10_000,
        initial_alphabet=[chr(i) for i in range(high - low + 1)],
    )  # fmt: skip
    bpe._tokenizer.train_from_iterator(texts, trainer=trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {"processor_class": "UniversalActionProcessor", "scale": scale, "vocab_size": vocabulary}
    config |= {"min_token": low, "action_dim": chunks.shape[2], "time_horizon": chunks.shape[1]} | changes
    (folder / "processor_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("length", [1, 2, 8, 50])
def test_the_basis_is_the_orthonormal_cosine_transform_and_its_inverse(length):
    x = np.random.default_rng(length).normal(size=(length, 3))
    basis = cosine_basis(length)
    np.testing.assert_allclose(basis @ x, dct(x, axis=0, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(basis.T @ x, idct(x, axis=0, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(basis @ basis.T, np.eye(length), atol=1e-12)


@given(arrays(np.float64, (HORIZON, DIMS), elements=st.floats(-5, 5)))
def test_decoding_returns_exactly_what_rounding_left(fast, chunk):
    ids = fast.encode(chunk)
    np.testing.assert_array_equal(fast.parse(ids), np.rint(dct(chunk, axis=0, norm="ortho") * 10 + 0.0))
    np.testing.assert_array_equal(fast.decode(ids), fast.reconstruct(fast.coefficients(chunk)))
    error = fast.decode(ids) - chunk
    assert np.abs(error).max() <= np.sqrt(HORIZON) / (2 * fast.scale) + 1e-5
    assert np.sqrt((error**2).mean()) <= 1 / (2 * fast.scale) + 1e-5


@pytest.mark.parametrize("scale", [10.0, 30.0, 100.0])
def test_a_finer_scale_errs_less(scale):
    fast = fit_fast(CHUNKS, scale=scale, vocabulary=4096)
    errors = [fast.decode(fast.encode(chunk)) - chunk for chunk in CHUNKS[:40]]
    # rounding to steps of 1/scale: a uniform error, which the orthonormal inverse keeps
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(1 / scale / np.sqrt(12), rel=0.1)


def test_low_frequencies_of_all_dimensions_come_first(fast):
    constant = np.tile(np.arange(DIMS) / 10, (HORIZON, 1))
    text = fast.tokenizer.decode(fast.encode(constant))
    assert [ord(c) + fast.min_token for c in text[: DIMS + 1]] == [0, 4, 9, 13, 18, 22, 27, 0]


def test_tokens_are_fewer_than_numbers(fast):
    counts = [len(fast.encode(chunk)) for chunk in CHUNKS]
    assert np.mean(counts) < 0.7 * HORIZON * DIMS


def test_negative_coefficients_keep_their_sign_which_the_default_min_token_loses():
    """smolva-rl builds the tokenizer without its min_token, so the class's 0 clamps a third of the coefficients."""
    toy = np.cumsum(np.random.default_rng(1).normal(size=(HORIZON, DIMS)) * 0.16, axis=0)
    fast = fit_fast(toy[None])
    values = fast.coefficients(toy)
    lost = fast.reconstruct(np.maximum(values, 0))  # max(v - min_token, 0) with min_token = 0
    theirs, ours = (np.sqrt(np.mean((x - toy) ** 2)) for x in (lost, fast.decode(fast.encode(toy))))
    assert (values < 0).mean() == pytest.approx(0.31, abs=0.03)
    assert theirs == pytest.approx(0.287, abs=0.02)
    assert ours == pytest.approx(0.029, abs=0.003)
    with pytest.raises(FastTokenError, match=r"expected coefficients in \[0, "):
        replace(fast, min_token=0).encode(toy)


def test_a_published_folder_is_read_and_gives_the_published_ids(tmp_path):
    fast = load_fast(published(tmp_path / "fast"))
    assert fast.min_token < 0 and (fast.horizon, fast.action_dim, fast.max_token) == (HORIZON, DIMS, None)
    for chunk in CHUNKS[:20]:
        values = np.around(dct(chunk, axis=0, norm="ortho") * 10).astype(int)
        text = "".join(chr(v - fast.min_token) for v in values.ravel())
        ids = fast.encode(chunk)
        assert ids == fast.tokenizer.encode(text).ids
        np.testing.assert_allclose(fast.decode(ids), idct(values / 10, axis=0, norm="ortho"), atol=1e-6)


def test_a_published_tokenizer_drops_what_it_has_no_byte_for_and_that_is_an_error(tmp_path):
    fast = load_fast(published(tmp_path / "fast", np.zeros((4, HORIZON, DIMS))))
    with pytest.raises(FastTokenError, match=r"expected a token for every coefficient, got none for \[13\]"):
        fast.encode(np.full((HORIZON, DIMS), 0.3))


def test_the_universal_tokenizer_takes_the_shape_of_the_policy(tmp_path):
    folder = published(tmp_path / "fast", action_dim=None, time_horizon=None)
    assert load_fast(folder, horizon=HORIZON, action_dim=DIMS).action_dim == DIMS
    with pytest.raises(FastTokenError, match="expected time_horizon, got none"):
        load_fast(folder)
    (folder / "processor_config.json").rename(folder / "preprocessor_config.json")
    assert load_fast(folder, horizon=HORIZON, action_dim=DIMS).horizon == HORIZON


def test_another_shape_than_the_policys_is_refused(tmp_path):
    folder = published(tmp_path / "fast")
    with pytest.raises(FastTokenError, match=r"time_horizon: expected 50, the policy's, got 20; fit a tokenizer"):
        load_fast(folder, horizon=50)


def test_saved_and_loaded_it_is_the_same(fast, tmp_path):
    fast.save(tmp_path)
    again = load_fast(tmp_path)
    assert again.to_json() == fast.to_json() and again.max_token == 250
    assert [again.encode(chunk) for chunk in CHUNKS[:20]] == [fast.encode(chunk) for chunk in CHUNKS[:20]]


def test_coefficients_outside_the_span_are_an_error_or_counted_and_clamped(fast):
    far = CHUNKS[0].copy()
    far[:, 0] += 20
    values = fast.coefficients(far)
    assert fast.outside(values) == 1 and fast.outside(fast.coefficients(CHUNKS[0])) == 0
    with pytest.raises(FastTokenError, match=r"expected coefficients in \[-250, 250\], got .* \.\.\. 9\d\d"):
        fast.encode(far)
    np.testing.assert_array_equal(fast.parse(fast.encode(far, outside="clamp")), values.clip(-250, 250))
    np.testing.assert_array_equal(fast.parse(fast.encode(-far, outside="clamp")), (-values).clip(-250, 250))


@given(st.lists(st.integers(-5, 900), max_size=30))
def test_hostile_ids_are_a_chunk_or_an_error(fast, ids):
    known = all(0 <= i < fast.vocabulary_size for i in ids)
    text = fast.tokenizer.decode([i for i in ids if i >= 0])
    if known and len(text) == HORIZON * DIMS:  # so few tokens may well be a whole chunk
        assert fast.parse(ids).ravel().tolist() == [ord(c) + fast.min_token for c in text]
    else:
        with pytest.raises(FastTokenError, match="expected ids"):
            fast.parse(ids)


def test_the_errors_of_ids_say_what_is_wrong(fast):
    ids = fast.encode(CHUNKS[0])
    with pytest.raises(FastTokenError, match=r"expected ids of 20 x 7 = 140 coefficients, got \d+ in .* is cut off"):
        fast.decode(ids[:-1])
    with pytest.raises(FastTokenError, match="got 280"):
        fast.decode(ids + ids)
    with pytest.raises(FastTokenError, match=r"expected ids in \[0, \d+\), got \[1023, -1\]"):
        fast.decode([*ids[:-1], 1023, -1])


def test_bytes_that_are_no_character_are_no_coefficient(tmp_path):
    chunks = np.concatenate([CHUNKS, CHUNKS * 4])  # a range of more than 128: two bytes for the characters behind it
    fast = load_fast(published(tmp_path / "fast", chunks))
    lone = next(i for i in range(fast.vocabulary_size) if fast.tokenizer.decode([i]) == "\ufffd")
    with pytest.raises(FastTokenError, match=r"expected coefficients up to \d+, got 65\d\d\d"):
        fast.decode([lone] * (HORIZON * DIMS))


@pytest.mark.parametrize("bad", [np.zeros((HORIZON, DIMS + 1)), np.zeros(HORIZON), np.full((HORIZON, DIMS), np.nan)])
def test_chunks_of_another_shape_or_not_finite_are_refused(fast, bad):
    with pytest.raises(FastTokenError, match=r"expected (chunks of shape \[\.\.\., 20, 7\]|finite actions, got 140)"):
        fast.encode(bad)


def test_a_vocabulary_smaller_than_the_range_is_refused():
    with pytest.raises(FastTokenError, match="expected at most 16 different coefficients"):
        fit_fast(CHUNKS, vocabulary=16)


def test_folders_that_are_none_say_what_is_missing(tmp_path):
    with pytest.raises(FastTokenError, match=r"expected tokenizer\.json and processor_config\.json .* got no folder"):
        load_fast(tmp_path / "no")
    folder = published(tmp_path / "fast", min_token=None)
    with pytest.raises(FastTokenError, match=r"got none for \['min_token'\]; without min_token every negative"):
        load_fast(folder)
    (folder / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(FastTokenError, match="expected a whole tokenizer, got one that cannot be read"):
        load_fast(folder)


def test_remote_code_in_the_folder_is_not_run_and_nothing_heavy_is_imported(tmp_path):
    folder = published(tmp_path / "fast")
    (folder / "processing_action_tokenizer.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = (
        "import sys, pathlib; from recap_model.policy.fast_tokenizer import load_fast;"
        f"load_fast(pathlib.Path({str(folder)!r})); print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]" and not (tmp_path / "ran").exists()
