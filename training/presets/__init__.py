"""Model presets by name: one file each, holding functions `policy()` and `critic()`."""

import difflib
from importlib import import_module
from typing import Any

NAMES = ("debug", "tiny", "pretrain_debug", "pretrain_tiny", "smolvla_debug", "smolvla_base")


def load(name: str) -> Any:
    """The preset module. Raises ValueError with the closest names for an unknown one."""
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"preset: expected one of {', '.join(NAMES)}, got {name!r}{hint}")
    return import_module(f"training.presets.{name}")
