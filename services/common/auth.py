"""Who may call: an optional shared key, and no web pages of strangers."""

import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from services.common.errors import ServiceError


def check_caller(headers: Mapping[str, str], query: Mapping[str, str], api_key: str | None) -> None:
    """Raise ServiceError `unauthorized` unless the caller presents the key (when there is one) and is no foreign page.

    The key comes as `Authorization: Api-Key KEY` or `Authorization: Bearer KEY`; a browser's event stream cannot set
    headers, so `?api_key=KEY` counts too. Browsers always send `Origin` when a page opens a websocket or posts: a page
    from another host than this service must not drive a robot just because the operator's browser can reach it.
    """
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise ServiceError("unauthorized", f"Origin: expected a page of this service, got {origin[:100]!r}")
    if api_key is None:
        return
    scheme, _, presented = headers.get("authorization", "").partition(" ")
    if scheme.lower() not in ("api-key", "bearer"):
        presented = query.get("api_key", "")
    if not hmac.compare_digest(presented.strip().encode(), api_key.encode()):
        raise ServiceError(
            "unauthorized",
            "Authorization: expected `Api-Key KEY` or `Bearer KEY` with the key of this service, got none or another",
        )
