"""An observation as it comes in by `recap.v1`: read, checked, its frames decoded. Both services use this."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from recap_client.images import JpegImage, decode_jpeg
from recap_model import conditioning
from recap_model.observation import ObservationError
from services.common.errors import bad_field

_PROMPT_CHARACTERS = 2000
# "Advantage:" in whatever case and spacing: a caller's text must not bring a clause of its own.
_CLAUSE = re.compile(re.escape(conditioning.positive_prompt("").split(":")[0].strip()) + r"\s*:", re.IGNORECASE)


@dataclass(frozen=True)
class Observation:
    """What a robot sees. images: camera -> uint8 [H, W, 3] or `JpegImage`; state [S] in physical units; prompt: the
    task as text. Unchecked: `task_text` and `recap_model.observation` judge the parts."""

    images: Mapping[str, Any]
    state: Any
    prompt: Any


def read_observation(body: Mapping[str, Any]) -> Observation:
    """The `observation` of a `recap.v1` message, its frames as they came. Raises ServiceError."""
    raw = body.get("observation")
    if not isinstance(raw, Mapping):
        raise bad_field("bad_message", "observation", "a map with images, state and prompt", type(raw).__name__)
    parts = with_text_keys(raw)
    images = parts.get("images")
    if not isinstance(images, Mapping):
        raise bad_field("bad_observation", "images", "a map of camera name to frame", type(images).__name__)
    prompt = parts.get("prompt")
    return Observation(
        with_text_keys(images),
        parts.get("state"),
        prompt.decode("utf-8", "replace") if isinstance(prompt, bytes) else prompt,
    )


async def decoded(observation: Observation, cameras: tuple[str, ...]) -> Observation:
    """The same with the JPEG frames of `cameras` decoded, off the event loop; arrays pass as they are."""
    wanted = {name: observation.images[name] for name in cameras if name in observation.images}
    if any(isinstance(frame, JpegImage) for frame in wanted.values()):
        wanted = await asyncio.to_thread(_decode_all, wanted)
    return replace(observation, images=wanted)


def task_text(prompt: Any) -> str:
    """Check a caller's prompt: plain text, not empty, no advantage clause. Raises ObservationError."""
    want = f"the task as text of 1 to {_PROMPT_CHARACTERS} characters"
    if not isinstance(prompt, str):
        raise ObservationError("prompt", want, "none" if prompt is None else type(prompt).__name__)
    if not prompt.strip() or len(prompt) > _PROMPT_CHARACTERS:
        raise ObservationError("prompt", want, f"{len(prompt)} characters")
    if _CLAUSE.search(prompt):
        raise ObservationError("prompt", "the task alone (the service adds the advantage clause)", repr(prompt[:80]))
    return prompt


def with_text_keys(body: Mapping[Any, Any]) -> dict[str, Any]:
    """Keys as text; msgpack may bring bytes."""
    return {key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key): body[key] for key in body}


def _decode_all(images: Mapping[str, Any]) -> dict[str, Any]:
    return {name: decode_jpeg(frame.data) if isinstance(frame, JpegImage) else frame for name, frame in images.items()}
