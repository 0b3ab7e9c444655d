"""FAST action tokens: chunks of actions <-> short sequences of ids. numpy and the `tokenizers` library; no torch.

A chunk is cosine-transformed over time, scaled, rounded, written as text (one character a coefficient, low frequencies
of all dimensions first) and compressed by byte-pair encoding (FAST, arXiv 2501.09747, section V). Only rounding loses
anything. The published folders are read, and ours are written, as `tokenizer.json` + `processor_config.json`.

The published decoder turns what it cannot decode into zeros, and its encoder drops characters that it has no token
for; a tokenizer that was built without its `min_token` loses the sign of every coefficient. Here all three are errors.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, trainers

TOKENIZER, CONFIG = "tokenizer.json", "processor_config.json"
_CONFIGS = (CONFIG, "preprocessor_config.json")
_HIGHEST = 0xD7FF  # the characters behind it are surrogates, which no text can hold


class FastTokenError(ValueError):
    """A folder, a chunk or a sequence of ids does not fit the tokenizer; the message says which and what to do."""


@lru_cache(maxsize=16)
def cosine_basis(length: int) -> NDArray[np.float64]:
    """The orthonormal DCT-II as a matrix [length, length]: basis @ x transforms, basis.T @ c is its inverse."""
    k, t = np.arange(length)[:, None], np.arange(length)[None, :]
    basis = np.sqrt(2.0 / length) * np.cos(np.pi * (2 * t + 1) * k / (2 * length))
    basis[0] /= np.sqrt(2.0)
    basis.setflags(write=False)
    return basis


@dataclass(frozen=True)
class FastTokenizer:
    """scale: steps per unit that coefficients are rounded to. min_token: the coefficient that character 0 stands for.

    max_token: the largest coefficient of the fit, None where the folder does not say. horizon, action_dim: the shape
    [T, A] of a chunk.
    """

    tokenizer: Tokenizer
    scale: float
    min_token: int
    horizon: int
    action_dim: int
    max_token: int | None = None

    @property
    def vocabulary_size(self) -> int:
        """Ids are 0 ... vocabulary_size - 1."""
        return int(self.tokenizer.get_vocab_size())

    @property
    def span(self) -> tuple[int, int]:
        """The smallest and the largest coefficient that there is a character for."""
        return self.min_token, self.min_token + _HIGHEST if self.max_token is None else self.max_token

    def coefficients(self, chunks: NDArray[Any]) -> NDArray[np.int64]:
        """Normalised actions [..., T, A] -> rounded coefficients [..., T, A], frequencies along T."""
        data = np.asarray(chunks, np.float64)
        if data.ndim < 2 or data.shape[-2:] != (self.horizon, self.action_dim):
            raise FastTokenError(
                f"fast: expected chunks of shape [..., {self.horizon}, {self.action_dim}], got {list(data.shape)}"
            )
        if not np.isfinite(data).all():
            raise FastTokenError(f"fast: expected finite actions, got {(~np.isfinite(data)).sum()} NaN or infinite")
        return np.rint(cosine_basis(self.horizon) @ data * self.scale).astype(np.int64)

    def outside(self, coefficients: NDArray[np.int64]) -> int:
        """How many of the coefficients have no character."""
        low, high = self.span
        return int(((coefficients < low) | (coefficients > high)).sum())

    def encode(self, chunk: NDArray[Any], *, outside: Literal["error", "clamp"] = "error") -> list[int]:
        """Normalised actions [T, A] -> ids (their number varies).

        outside: what becomes of a coefficient beyond `span`. "clamp" moves it to the end of the span; the caller counts
        them (`outside`) and says so. Raises FastTokenError, also for a coefficient that the tokenizer has no token for.
        """
        coefficients, (low, high) = self.coefficients(chunk), self.span
        if outside == "error" and self.outside(coefficients):
            raise FastTokenError(
                f"fast: expected coefficients in [{low}, {high}], got {coefficients.min()} ... {coefficients.max()}; "
                "fit the tokenizer on this data (`recap fit-fast`), or normalise the actions as it was fitted"
            )
        text = "".join(map(chr, (np.clip(coefficients, low, high) - low).ravel().tolist()))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self._text(ids) != text:
            known = {c for c in set(text) if self._text(self.tokenizer.encode(c, add_special_tokens=False).ids) == c}
            raise FastTokenError(
                "fast: expected a token for every coefficient, got none for "
                f"{sorted(ord(c) + low for c in set(text) - known)[:8]}; fit the tokenizer on this data "
                "(`recap fit-fast`)"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Ids of one chunk -> normalised actions float32 [T, A]. Raises FastTokenError for what is not one chunk."""
        return self.reconstruct(self.parse(ids))

    def parse(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """Ids of one chunk -> its rounded coefficients [T, A]."""
        size = self.vocabulary_size
        wrong = [i for i in ids if not 0 <= i < size]
        if wrong:
            raise FastTokenError(f"fast: expected ids in [0, {size}), got {wrong[:8]}")
        text, expected = self._text(ids), self.horizon * self.action_dim
        if len(text) != expected:
            raise FastTokenError(
                f"fast: expected ids of {self.horizon} x {self.action_dim} = {expected} coefficients, got {len(text)} "
                f"in {len(ids)} ids; the sequence is cut off, or belongs to chunks of another shape"
            )
        values = np.fromiter(map(ord, text), np.int64, expected) + self.min_token
        if (values > self.span[1]).any():  # bytes that do not make up a character decode to one far up
            raise FastTokenError(f"fast: expected coefficients up to {self.span[1]}, got {values.max()}")
        return values.reshape(self.horizon, self.action_dim)

    def reconstruct(self, coefficients: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rounded coefficients [..., T, A] -> normalised actions float32 [..., T, A].

        Within sqrt(T) / (2 * scale) of the actions, and within 1 / (2 * scale) in the root mean square.
        """
        return (cosine_basis(self.horizon).T @ (coefficients / self.scale)).astype(np.float32)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def to_json(self) -> dict[str, Any]:
        """The published keys, and `max_token`."""
        return {
            "processor_class": "UniversalActionProcessor",
            "scale": self.scale,
            "vocab_size": self.vocabulary_size,
            "min_token": self.min_token,
            "max_token": self.max_token,
            "action_dim": self.action_dim,
            "time_horizon": self.horizon,
        }

    def save(self, folder: Path) -> None:
        """Write the two files into an existing folder."""
        self.tokenizer.save(str(folder / TOKENIZER))
        (folder / CONFIG).write_text(json.dumps(self.to_json(), indent=1) + "\n")


def load_fast(folder: Path, *, horizon: int | None = None, action_dim: int | None = None) -> FastTokenizer:
    """Read a folder of `save`, or a published one. Its Python file, if it has one, is not looked at.

    horizon, action_dim: the shape of a chunk where the folder leaves it open; where it does not, they must agree.
    Raises FastTokenError.
    """
    folder = Path(folder)
    path = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
    if path is None or not (folder / TOKENIZER).is_file():
        got = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else "no folder"
        raise FastTokenError(
            f"{folder}: expected {TOKENIZER} and {CONFIG} (of `recap fit-fast`, or a published FAST tokenizer), "
            f"got {got}"
        )
    try:
        data = json.loads(path.read_text())
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise FastTokenError(f"{folder}: expected a whole tokenizer, got one that cannot be read: {error}") from error
    # the class's defaults are scale 10 and min_token 0, which cannot hold a negative coefficient: never assumed
    missing = [name for name in ("scale", "min_token") if not isinstance(data.get(name), int | float)]
    if missing:
        raise FastTokenError(
            f"{path}: expected numbers for scale and min_token, got none for {missing}; without min_token every "
            "negative coefficient would be lost"
        )
    shape = {
        name: _shape(path, name, data.get(name), asked)
        for name, asked in (("time_horizon", horizon), ("action_dim", action_dim))
    }
    return FastTokenizer(
        tokenizer, float(data["scale"]), int(data["min_token"]), shape["time_horizon"], shape["action_dim"],
        data.get("max_token"),
    )  # fmt: skip


def _shape(path: Path, name: str, stated: int | None, asked: int | None) -> int:
    if stated is None and asked is None:
        raise FastTokenError(f"{path}: expected {name}, got none; say it where the tokenizer is loaded")
    if stated is not None and asked is not None and stated != asked:
        raise FastTokenError(
            f"{path}: {name}: expected {asked}, the policy's, got {stated}; fit a tokenizer for this policy (`recap "
            "fit-fast`)"
        )
    return int(stated if stated is not None else asked)  # type: ignore[arg-type]


def fit_fast(
    chunks: NDArray[Any], *, scale: float = 10.0, vocabulary: int = 1024, span: tuple[int, int] | None = None
) -> FastTokenizer:
    """Fit a tokenizer on normalised chunks [N, T, A] (quantile 1 % and 99 % to [-1, 1], not clipped).

    As in the published fit, `min_token` is the smallest coefficient, and the alphabet is all from it to the largest;
    unlike there, text is not cut into words and bytes first, so a token may span any run of coefficients and no
    coefficient of the alphabet lacks one. span: of the coefficients of all data, where `chunks` are a sample of it.
    Raises FastTokenError when the alphabet alone does not fit the vocabulary.
    """
    if chunks.ndim != 3 or not len(chunks):
        raise FastTokenError(f"fast: expected chunks of shape [N, T, A] with N >= 1, got {list(chunks.shape)}")
    empty = FastTokenizer(Tokenizer(models.BPE()), scale, 0, chunks.shape[1], chunks.shape[2])
    values = empty.coefficients(chunks)
    low, high = span or (int(values.min()), int(values.max()))
    if high - low + 1 > vocabulary:
        raise FastTokenError(
            f"fast: expected at most {vocabulary} different coefficients, the vocabulary's size, got the range {low} "
            f"... {high}; raise --vocabulary, lower --scale, or look for outliers in the actions (`recap data stats`)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Fuse()
    texts = ("".join(map(chr, row)) for row in (values - low).reshape(len(values), -1).tolist())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, special_tokens=[], show_progress=False, max_token_length=10_000,
        initial_alphabet=[chr(i) for i in range(high - low + 1)],
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return FastTokenizer(tokenizer, scale, low, chunks.shape[1], chunks.shape[2], high)
