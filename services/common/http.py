"""Request bodies, bounded."""

from fastapi import Request

from services.common.errors import bad_field


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused with `too_large` as soon as it is known to be above `limit` bytes."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise bad_field("too_large", "body", f"at most {limit} bytes", f"{size} bytes or more")
        parts.append(part)
    return b"".join(parts)
