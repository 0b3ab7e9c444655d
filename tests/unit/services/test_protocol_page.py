"""docs/protocol.md says what is true: its bytes are the codec's, its codes are all the codes there are."""

import re
from pathlib import Path

import numpy as np

from recap_client import wire
from services.common.errors import CODES

PAGE = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()


def test_the_byte_examples_are_what_the_codec_writes() -> None:
    lines = PAGE.split("    82  ", 1)[1].split("\n\n", 1)[0].splitlines()
    shown = ["82", *(re.match(r"\s*((?:[0-9a-f]{2} ?)+)(?:\s|$)", line).group(1) for line in lines[1:])]  # type: ignore[union-attr]
    assert bytes.fromhex(" ".join(shown)) == wire.pack({"state": np.float32([0.5, -1]), "prompt": "open"})
    for message in ({"type": "ping", "t": 1.5}, {"type": "ok"}):
        assert f"`{wire.pack(message).hex(' ')}`" in PAGE


def test_every_error_code_is_explained() -> None:
    explained = re.findall(r"^\| `(\w+)` \|.*\| (\d{3}) \|$", PAGE, re.MULTILINE)
    assert {code for code, _ in explained} == set(CODES)
