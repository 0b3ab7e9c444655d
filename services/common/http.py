"""Request bodies, bounded."""

from fastapi import Request
from starlette.requests import ClientDisconnect

from services.common.errors import bad_field


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused with `too_large` as soon as it is known to be above `limit` bytes, and with `bad_message` when
    the caller is gone before its end."""
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise bad_field("too_large", "body", f"at most {limit} bytes", f"{size} bytes or more")
            parts.append(part)
    except ClientDisconnect as error:
        raise bad_field("bad_message", "body", "all of it", f"{size} bytes and the end of the connection") from error
    return b"".join(parts)
