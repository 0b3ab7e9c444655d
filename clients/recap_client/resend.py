"""Send what a recording holds to a policy service again, and compare the actions.

A log of the service (`recap serve --record`) holds every request whole: noise, frames and chunk. A robot's own log
holds what it saw at every step, the first rows of each chunk and the episode's seed; which step's frame was sent for a
chunk is not in it, so that of several candidates the one that fits best counts.
"""

import base64
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_client.images import JpegImage, decode_png
from recap_client.rollout import RolloutError, messages
from recap_client.session import ProtocolError, Session
from recap_client.spec import RobotSpec

_LAG = 8  # steps that a reply may have taken, in a robot's log


@dataclass(frozen=True)
class Seen:
    """What was seen at a step. images: in wire form."""

    step: int
    images: Mapping[str, Any]
    state: NDArray[np.float32]


@dataclass
class Request:
    """A recorded request. seen: candidates of its observation, the likeliest first; wanted: step -> action [A] as it
    was; options: what else goes into the message."""

    seen: tuple[Seen, ...]
    prompt: str
    seq: int
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    wanted: dict[int, NDArray[np.float32]] = field(default_factory=dict)


@dataclass
class Differences:
    """Of all recorded actions that were compared. largest, total float64 [A]; lossy: frames may have come raw and
    were recorded as JPEG, so that equal actions cannot be expected."""

    largest: NDArray[np.float64]
    total: NDArray[np.float64]
    requests: int = 0
    actions: int = 0
    lossy: bool = False

    def add(self, difference: NDArray[np.float64]) -> None:
        """difference float64 [T, A], absolute."""
        self.requests += 1
        self.actions += len(difference)
        self.largest = np.maximum(self.largest, difference.max(axis=0))
        self.total += difference.sum(axis=0)


def resend(path: Path, url: str, *, tolerance: float, headers: Mapping[str, str] | None = None,
           tls_ca: Path | None = None) -> tuple[Differences, Mapping[str, str], Mapping[str, Any]]:  # fmt: skip
    """Ask the policy service at `url` everything in `path` again: differences, the model that answered, and the head of
    the recording. tls_ca: see `Session`. Raises RolloutError, SpecError, and the errors of `Session.call`."""
    stream = _messages(path)
    head = next((message for topic, _, message in stream if topic == "/episode"), None)
    if head is None:
        raise RolloutError(f"{path}: expected a rollout log (MCAP with an /episode message), got none")
    spec = RobotSpec.from_json(head["spec"])
    width = len(spec.action)
    found = Differences(np.zeros(width), np.zeros(width))
    session = Session(url, "policy", spec, headers=headers, tls_ca=tls_ca)
    try:
        session.call({"type": "reset", "robot": "replay", "episode": path.stem[:100], "task": head["task"],
                      "forward": False})  # fmt: skip
        read = _service_requests if head.get("source") == "service" else _robot_requests
        for request in read(stream, head, spec, found):
            found.add(_difference(session, request, tolerance))
        if not found.requests:
            raise RolloutError(
                f"{path}: expected requests with their seed (of a seeded episode, with images), got none"
            )
        return found, session.welcome.model, head
    finally:
        session.close()


def _messages(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Up to where the file is damaged."""
    try:
        yield from messages(path)
    except OSError as error:
        raise RolloutError(f"{path}: cannot read the rollout log: {error}") from error
    except Exception:  # the parser raises anything on a damaged tail; what came before is good
        return


def _difference(session: Session, request: Request, tolerance: float) -> NDArray[np.float64]:
    best: NDArray[np.float64] | None = None
    wanted = np.array(list(request.wanted.values()), np.float64)
    for seen in request.seen:
        rows = [step - seen.step for step in request.wanted]
        reply = session.call({
            "type": "act", "seq": request.seq, "seed": request.seed, "robot": "replay", "forward": False,
            "observation": {"images": seen.images, "state": seen.state, "prompt": request.prompt}, **request.options,
        })  # fmt: skip
        actions = reply.get("actions")
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.shape[1] != wanted.shape[1]:
            raise ProtocolError(
                f"{session.url}: actions: expected [H, {wanted.shape[1]}], got {type(actions).__name__}"
            )
        if rows[-1] >= len(actions):
            continue
        difference = np.abs(actions[rows].astype(np.float64) - wanted)
        if best is None or difference.max() < best.max():
            best = difference
        if best.max() <= tolerance:
            break
    if best is None:
        raise ProtocolError(f"{session.url}: actions: expected the chunk length of the recording, got a shorter one")
    return best


def _service_requests(stream: Iterator[tuple[str, int, dict[str, Any]]], _: Mapping[str, Any], spec: RobotSpec,
                      found: Differences) -> Iterator[Request]:  # fmt: skip
    """One a step."""
    for step, seen in _steps(stream, spec):
        found.lossy |= bool(step["lossy"])
        options: dict[str, Any] = {}
        if step.get("previous") is not None:
            previous = step["previous"]
            rows = np.array(previous["actions"], np.float32)
            options = {"previous": rows, "delay": previous["delay"], "horizon": previous["horizon"]}
        if step["seed"] is not None:
            wanted = {seen.step + row: np.array(action, np.float32) for row, action in enumerate(step["actions"])}
            yield Request((seen,), step["prompt"], step["seq"], step["seed"], options, wanted)


def _robot_requests(stream: Iterator[tuple[str, int, dict[str, Any]]], head: Mapping[str, Any], spec: RobotSpec,
                    found: Differences) -> Iterator[Request]:  # fmt: skip
    """One a chunk, of an episode with a seed."""
    before: deque[Seen] = deque(maxlen=_LAG)
    request: Request | None = None
    for step, seen in _steps(stream, spec):
        before.append(seen)
        found.lossy |= any(isinstance(frame, JpegImage) for frame in seen.images.values())
        if step["chunk"] < 0 or step["proposed"] is None or int(head["seed"]) < 0 or not seen.images:
            continue
        if request is None or request.seq != step["chunk"]:
            if request is not None:
                yield request
            request = Request(tuple(reversed(before)), head["task"], step["chunk"], int(head["seed"]))
        request.wanted[seen.step] = np.array(step["proposed"], np.float32)
    if request is not None:
        yield request


def _steps(stream: Iterator[tuple[str, int, dict[str, Any]]], spec: RobotSpec) -> Iterator[tuple[dict[str, Any], Seen]]:
    """Each step with its frames, which stand before it in the file."""
    images: dict[str, Any] = {}
    for topic, _, message in stream:
        if topic.startswith("/camera/"):
            data = base64.b64decode(message["data"])
            images[topic.removeprefix("/camera/")] = (
                JpegImage(data) if message["format"] == "jpeg" else decode_png(data)
            )
        elif topic == "/step":
            state = np.array(message["state"], np.float64).astype(np.float32)
            complete = images if set(images) == set(spec.camera_names) else {}
            yield message, Seen(message["step"], complete, state)
            images = {}
