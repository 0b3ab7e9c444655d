"""Text -> token ids and mask, padded to a fixed width. Uses the `tokenizers` library; no torch, no transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from recap_model import conditioning

PAD, UNKNOWN = "<pad>", "<unk>"


class PromptTooLong(ValueError):
    """A prompt has more tokens than the model's text width; cutting it would drop the advantage clause."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with a fixed output width (`max_tokens`)."""

    tokenizer: Tokenizer
    max_tokens: int

    def __call__(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """ids int32 [max_tokens] (padding on the right, id 0) and mask bool [max_tokens] (True where text)."""
        ids = self.tokenizer.encode(text).ids
        if len(ids) > self.max_tokens:
            raise PromptTooLong(f"prompt: expected at most {self.max_tokens} tokens, got {len(ids)}: {text!r}")
        padded = np.zeros(self.max_tokens, np.int32)
        padded[: len(ids)] = ids
        return padded, np.arange(self.max_tokens) < len(ids)

    def unknown_words(self, text: str) -> tuple[str, ...]:
        """Words of `text` that the vocabulary does not hold: the model reads nothing in their place."""
        unknown = self.tokenizer.token_to_id(UNKNOWN)
        encoded = self.tokenizer.encode(text)
        spans = zip(encoded.ids, encoded.offsets, strict=True)
        return tuple(text[start:end] for token, (start, end) in spans if token == unknown)

    @property
    def vocabulary_size(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def save(self, path: Path) -> None:
        self.tokenizer.save(str(path))

    @staticmethod
    def load(path: Path, max_tokens: int) -> "TextTokenizer":
        return TextTokenizer(Tokenizer.from_file(str(path)), max_tokens)


def word_tokenizer(tasks: Sequence[str], max_tokens: int) -> TextTokenizer:
    """A word-level tokenizer over the given tasks and the conditioning text: what the small presets train from scratch.

    Its width is `max_tokens`, or that of the longest prompt where that is more.

    Case is folded; newline is a token of its own, as it is in the tokenizers of the large models.
    """
    splitter = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    normalizer = normalizers.Lowercase()
    texts = [conditioning.prompt(task, i) for task in sorted(tasks) for i in (1, 0)]
    words: dict[str, None] = {}
    for text in texts:
        words.update((word, None) for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    vocabulary = {token: i for i, token in enumerate([PAD, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    longest = max((len(tokenizer.encode(text).ids) for text in texts), default=0)
    return TextTokenizer(tokenizer, max(max_tokens, longest))
