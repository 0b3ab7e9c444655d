"""JSON that callers send, bounded before it is parsed: two bytes (`[]`) are 56 in memory, and a body is megabytes."""

import json
from typing import Any

from services.common.errors import bad_field
from services.common.settings import Limits

_CONTAINERS = 1 << 12


def parse_object(data: bytes | str, limits: Limits, what: str = "body") -> dict[str, Any]:
    """The JSON object in `data`. Raises ServiceError `too_large` before anything is made of too many values, or
    `bad_message`."""
    _bound(what, "values", _count(data, ","), limits.items)
    _bound(what, "lists and maps", _count(data, "[") + _count(data, "{"), limits.items // 3 + _CONTAINERS)
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise bad_field("bad_message", what, "a JSON object", str(error)[:120]) from error
    if not isinstance(parsed, dict):
        raise bad_field("bad_message", what, "a JSON object", type(parsed).__name__)
    return parsed


def _count(data: bytes | str, sign: str) -> int:
    return data.count(sign) if isinstance(data, str) else data.count(sign.encode())


def _bound(what: str, of: str, got: int, most: int) -> None:
    if got > most:
        raise bad_field("too_large", what, f"at most {most} {of} (arrays as envelopes, not as lists)", str(got))
