"""An observation as it comes in by `recap.v1`: read, checked, its frames decoded. Both services use this."""

import asyncio
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from recap_client.images import JpegImage, decode_jpeg, jpeg_size
from recap_client.spec import Camera
from recap_model import conditioning
from recap_model.observation import ObservationError
from services.common.errors import bad_field

_PROMPT_CHARACTERS = 2000
_DECODERS = 4
_JPEG_EXTRA = 1 << 16  # bytes that a JPEG may have above the raw frame: its tables and what cameras write into it
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


async def decoded(observation: Observation, cameras: tuple[Camera, ...]) -> Observation:
    """The same with the JPEG frames of `cameras` decoded, off the event loop; arrays pass as they are.

    A JPEG whose header gives another size than the camera's is refused before its pixels exist (ObservationError).
    """
    images = {camera.name: observation.images[camera.name] for camera in cameras if camera.name in observation.images}
    if any(isinstance(frame, JpegImage) for frame in images.values()):
        images = await asyncio.get_running_loop().run_in_executor(_decoders(), _decode_all, images, cameras)
    return Observation(images, observation.state, observation.prompt)


@cache
def _decoders() -> ThreadPoolExecutor:
    """A few threads of their own: a burst of JPEG must keep nothing waiting that else runs in threads."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, _DECODERS), thread_name_prefix="jpeg")


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


def _decode_all(frames: Mapping[str, Any], cameras: tuple[Camera, ...]) -> dict[str, Any]:
    by_name = {camera.name: camera for camera in cameras}
    return {
        name: _decode(frame.data, by_name[name]) if isinstance(frame, JpegImage) else frame
        for name, frame in frames.items()
    }


def _decode(data: bytes, camera: Camera) -> Any:
    field, raw = f"images[{camera.name}]", camera.height * camera.width * 3
    if len(data) > raw + _JPEG_EXTRA:  # thousands of empty scans, each of which costs a pass over the frame
        raise ObservationError(field, f"a JPEG of at most {raw + _JPEG_EXTRA} bytes", f"{len(data)} bytes")
    height, width = jpeg_size(data)
    if (height, width) != (camera.height, camera.width):
        raise ObservationError(field, f"uint8 [{camera.height}, {camera.width}, 3]", f"a JPEG of [{height}, {width}]")
    return decode_jpeg(data)
