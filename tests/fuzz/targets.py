"""One target per decoder: bytes that a stranger may send, through everything a front does before the model sees them.

A target returns for good input and raises one of its typed errors for bad input; anything else is a finding.
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from recap_client import wire
from recap_client.images import ImageError, decode_jpeg, decode_png
from recap_client.rollout import RolloutError, read_rollout
from recap_client.spec import SpecError
from recap_model.observation import prepare_images, prepare_state
from recap_model.spec import spec_from_json
from repository_factory import robot_spec
from services.common import json_numpy
from services.common.channel import decode, error_message, number, text, whole
from services.common.errors import fault_of
from services.common.json_body import parse_object
from services.common.observation import Observation, decoded, read_observation, task_text
from services.common.settings import limits_for
from services.policy.fronts import groot_codec, groot_modality, lerobot_messages, openpi, openvla, roboarena

ROBOT = robot_spec(size=4)
LIMITS = limits_for(ROBOT)
LIMIT = LIMITS.message


@dataclass(frozen=True)
class Target:
    """run: the decoder. allowed: errors it may raise, None = whatever `fault_of` knows for a caller's mistake.
    form: how the corpus is encoded, for mutations of its tree (`fuzz.trees`). grows: MiB that one input may take."""

    name: str
    run: Callable[[bytes], None]
    form: str
    allowed: tuple[type[Exception], ...] | None = None
    grows: int = 64

    def permits(self, error: BaseException) -> bool:
        if self.allowed is not None:
            return isinstance(error, self.allowed)
        return isinstance(error, Exception) and fault_of(error).code != "internal"


def prepared(observation: Observation) -> None:
    """What the pipeline does with any front's observation."""
    task_text(observation.prompt)
    prepare_images(_frames(observation).images, ROBOT)
    prepare_state(observation.state, ROBOT)


def _frames(observation: Observation) -> Observation:
    return _loop().run_until_complete(decoded(observation, ROBOT.cameras))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def _wire(data: bytes) -> None:
    wire.pack(wire.unpack(data, max_bytes=LIMIT))


def _native(data: bytes) -> None:
    body = decode(data, LIMIT)
    wire.pack(error_message(fault_of(ValueError()), body.get("seq")))  # every refusal sends this back
    for name in ("seq", "seed"):
        whole(body, name)
    for name in ("t_obs", "deadline_ms", "act_latency_ms"):
        number(body, name)
    for name in ("robot", "episode", "task"):
        text(body, name, "", limit=128)
    prepared(read_observation(body))


def _openpi(data: bytes) -> None:
    body = decode(data, LIMIT)
    if roboarena.endpoint(body) == "reset":
        wire.pack({"episode": roboarena.session_id(body)})
        return
    arena = "endpoint" in body
    prepared(openpi.read_observation(roboarena.translated(body, ROBOT) if arena else body, ROBOT.camera_names))


def _openvla(data: bytes) -> None:
    payload, _ = openvla._parse(data, LIMITS)
    prepared(openvla._observation(payload, ROBOT.camera_names))


def _critic(data: bytes) -> None:
    body = json_numpy.decode(parse_object(data, LIMITS))
    number(body, "t_obs")
    text(body, "robot", "robot", limit=64)
    prepared(read_observation(body))


def _lerobot_stream(data: bytes) -> None:
    """A byte of length before each message of the stream."""

    async def messages() -> AsyncIterator[bytes]:
        at = 0
        while at < len(data):
            yield data[at + 1 : at + 1 + data[at]]
            at += 1 + data[at]

    _loop().run_until_complete(lerobot_messages.receive_chunks(messages(), LIMIT))


def _lerobot_setup(data: bytes) -> None:
    lerobot_messages.read_setup(lerobot_messages.write_bytes(1, data), ROBOT)


def _lerobot_observation(data: bytes) -> None:
    prepared(lerobot_messages.read_timed_observation(data, lerobot_messages.Setup(), ROBOT).observation)


def _groot(data: bytes) -> None:
    request, _ = groot_codec.unpack(data, LIMIT)
    observation, _ = groot_modality.read_observation(request.get("data"), ROBOT)
    prepared(observation)


def _jpeg(data: bytes) -> None:
    decode_jpeg(data)


def _png(data: bytes) -> None:
    decode_png(data)


def _spec(data: bytes) -> None:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return  # the parser's own matter
    spec_from_json(raw)


@cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="recap-fuzz-")
    _keep.append(folder)
    return Path(folder.name) / "rollout.mcap"


_keep: list[object] = []


def _rollout(data: bytes) -> None:
    _scratch().write_bytes(data)
    read_rollout(_scratch())


TARGETS = {
    target.name: target
    for target in (
        Target("wire", _wire, "msgpack", (wire.WireError,)),
        Target("native", _native, "msgpack", grows=256),  # a JPEG may claim 4096 x 4096 pixels
        Target("openpi", _openpi, "msgpack", grows=256),
        Target("openvla", _openvla, "json"),
        Target("critic", _critic, "json"),
        Target("lerobot_stream", _lerobot_stream, "bytes"),
        Target("lerobot_setup", _lerobot_setup, "pickle"),
        Target("lerobot_observation", _lerobot_observation, "pickle"),
        Target("groot", _groot, "msgpack"),
        Target("jpeg", _jpeg, "bytes", (ImageError,), grows=256),
        Target("png", _png, "bytes", (ImageError,), grows=256),
        Target("spec", _spec, "json", (SpecError,)),
        Target("rollout", _rollout, "mcap", (RolloutError,)),
    )
}
