"""Weights files: what is read, and how everything else is refused."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from recap_model.policy.weights import WeightsError, load_weights, read_weights
from recap_model.tokenizer import TextTokenizer


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def state() -> dict[str, torch.Tensor]:
    return {name: torch.randn(p.shape) for name, p in model().state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_folder", [True, False])
def test_weights_come_back_as_float32(tmp_path: Path, dtype: torch.dtype, as_folder: bool) -> None:
    want, module = {name: t.to(dtype) for name, t in state().items()}, model()
    save_file(want, tmp_path / "model.safetensors")
    load_weights(module, tmp_path if as_folder else tmp_path / "model.safetensors")
    for name, p in module.state_dict().items():
        assert p.dtype == torch.float32
        assert torch.equal(p, want[name].float())


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """The first byte of a safetensors file is the low byte of its header's length, here that of a pickle."""
    path = tmp_path / "model.safetensors"
    for size in range(400):
        save_file(state(), path, metadata={"pad": "x" * size})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    load_weights(model(), path)


def test_all_differences_come_in_one_message_and_change_nothing(tmp_path: Path) -> None:
    module, tensors = model(), state()
    before = {name: p.clone() for name, p in module.state_dict().items()}
    del tensors["0.bias"]
    tensors["0.weight"] = torch.zeros(4, 5)
    tensors["1.weight"] = torch.zeros(4, dtype=torch.int64)
    tensors |= {f"more.{i:02}": torch.zeros(1) for i in range(11)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_weights(module, tmp_path)
    said = str(caught.value)
    assert "1 missing: 0.bias;" in said
    assert "11 unknown: more.00, " in said and "more.07 and 3 more" in said and "more.08" not in said
    assert "2 of another shape or type: 0.weight (expected float32 [4, 3], got float32 [4, 5])" in said
    assert "1.weight (expected float32 [4], got int64 [4])" in said
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())


class Bomb:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "weights.pt", "last.ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str, zipped: bool) -> None:
    data = pickle.dumps(Bomb())
    if zipped:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("data.pkl", data)
    else:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(WeightsError, match=r"pickles are never opened.*re-save it with safetensors") as caught:
        load_weights(model(), tmp_path)
    assert name in str(caught.value)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state(), path)
    whole = path.read_bytes()
    for cut, word in ((len(whole) - 4, "cut off"), (40, "cut off"), (0, "0 bytes"), (5, "5 bytes")):
        path.write_bytes(whole[:cut])
        with pytest.raises(WeightsError, match=word):
            read_weights(path)
    path.write_bytes(b"hello, this is text")
    with pytest.raises(WeightsError, match="begin with b'hello"):
        read_weights(path)
    path.unlink()
    with pytest.raises(WeightsError, match="expected a safetensors file, got none"):
        read_weights(tmp_path)


def test_a_vocabulary_without_an_unknown_token_knows_every_word() -> None:
    """As the byte-level tokenizer of SmolVLM2, which has no such token."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert TextTokenizer(tokenizer, 48).unknown_words("öffne the drawer\n") == ()
