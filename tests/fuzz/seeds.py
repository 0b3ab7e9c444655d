"""Valid messages of every front, by the real encoders. `python -m fuzz.seeds` writes them into the corpus.

The corpus also keeps past findings, `found-*`: inputs that once broke a decoder.
"""

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from fuzz.targets import LIMIT, ROBOT
from groot_client import nd, npy
from lerobot_pickles import RemotePolicyConfig, TimedObservation, lerobot_pickle
from recap_client import wire
from recap_client.images import JpegImage, encode_jpeg, encode_png
from recap_client.record import EpisodeInfo, Outcome, Recorder, StepRecord
from recap_model.spec import CriticSpec, PolicySpec, spec_to_json
from repository_factory import TASKS
from service_harness import act, observation
from services.common import json_numpy
from services.policy.fronts.lerobot_messages import BEGIN, END, MIDDLE, write_bytes

CORPUS = Path(__file__).parent / "corpus"


def seeds() -> Iterator[tuple[str, str, bytes]]:
    """(target, name, message)."""
    seen = observation(ROBOT)
    state, images = seen["state"], seen["images"]
    jpeg = {name: JpegImage(encode_jpeg(frame)) for name, frame in images.items()}
    yield "wire", "nested", wire.pack({"a": [1, "text", None, 2.5, np.float32(3)], "b": {"c": state, "d": images}})
    yield "native", "act", wire.pack(act(ROBOT, deadline_ms=50.0, seed=3))
    yield "native", "act-jpeg", wire.pack(act(ROBOT, observation={**seen, "images": jpeg}))
    yield "openpi", "libero", wire.pack(
        {**{f"observation/{name}": frame for name, frame in images.items()}, "observation/state": state,
         "prompt": TASKS[0]}
    )  # fmt: skip
    yield "openpi", "aloha", wire.pack(
        {"images": {name: np.moveaxis(frame, -1, 0) / 255.0 for name, frame in images.items()}, "state": state,
         "prompt": TASKS[0]}
    )  # fmt: skip
    yield "openpi", "roboarena", wire.pack(
        {"endpoint": "infer", "session_id": "s", "observation/exterior_image_0_left": images["front"],
         "observation/exterior_image_1_left": images["top"], "observation/cartesian_position": state[:3],
         "observation/gripper_position": state[3:], "prompt": TASKS[0]}
    )  # fmt: skip
    yield "openpi", "roboarena-reset", wire.pack({"endpoint": "reset", "session_id": np.array(["s"])})
    enveloped = {name: json_numpy.encode(frame) for name, frame in images.items()}
    plain = {"state": [float(x) for x in state], "instruction": TASKS[0]}
    yield "openvla", "envelopes", _json({"image": enveloped["front"], "top": enveloped["top"], **plain})
    yield "openvla", "encoded", _json({"encoded": json.dumps({"images": enveloped, **plain})})
    yield "openvla", "lists", _json(
        {"observation": {"images": {n: f.tolist() for n, f in images.items()}, "state": plain["state"],
                         "task": TASKS[0]}}
    )  # fmt: skip
    body = {"images": enveloped, "state": json_numpy.encode(state), "prompt": TASKS[0]}
    yield "critic", "observe", _json({"type": "observe", "robot": "r", "t_obs": 1.5, "observation": body})
    raw = {dim.name: float(x) for dim, x in zip(ROBOT.state, state, strict=True)} | images | {"task": TASKS[0]}
    whole = lerobot_pickle(TimedObservation(1.0, 3, raw))
    yield "lerobot_observation", "numpy", whole
    yield (
        "lerobot_observation",
        "scalars",
        lerobot_pickle(TimedObservation(1.0, 3, {**raw, "x": np.float32(1), "y": np.int64(2)}), 5),
    )
    yield "lerobot_setup", "config", lerobot_pickle(RemotePolicyConfig("smolvla", "path", _features(), 8))
    pieces = [(BEGIN, whole[:50]), (MIDDLE, whole[50:100]), (END, whole[100:200])]
    yield "lerobot_stream", "three", b"".join(_piece(stage, data) for stage, data in pieces)
    for name, encode in (("npy", npy), ("nd", nd)):
        data = {
            "video": {camera: frame[None, None] for camera, frame in images.items()},
            "state": {dim.name: state[None, None, i : i + 1] for i, dim in enumerate(ROBOT.state)},
            "language": {"task": [[TASKS[0]]]},
        }
        yield "groot", name, msgpack.packb({"endpoint": "get_action", "data": {"observation": data}}, default=encode)
    flat = {f"video.{n}": f[None] for n, f in images.items()} | {"state.all": state[None], "task": [TASKS[0]]}
    yield "groot", "flat", msgpack.packb({"data": flat}, default=npy)
    yield "jpeg", "frame", encode_jpeg(images["front"])
    yield "jpeg", "progressive", _progressive(images["front"])
    yield "png", "frame", encode_png(images["front"])
    yield "spec", "policy", _json(spec_to_json(PolicySpec(ROBOT, 8, 16)))
    yield "spec", "critic", _json(spec_to_json(CriticSpec(ROBOT, 16, 201, -1.0, 0.0, {TASKS[0]: 40.0})))
    yield "rollout", "episode", _rollout(images, state)


def write_seeds(folder: Path = CORPUS) -> None:
    """Write or renew them; past findings stay."""
    for target, name, data in seeds():
        path = folder / target / f"{name}.bin"
        assert len(data) <= LIMIT
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def corpus(target: str) -> list[bytes]:
    """The fixed inputs of a target, in the order of their names."""
    return [path.read_bytes() for path in sorted((CORPUS / target).glob("*.bin"))]


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()


def _piece(stage: int, data: bytes) -> bytes:
    message = bytes([0x08, stage]) + write_bytes(2, data)
    return bytes([len(message)]) + message


def _features() -> dict[str, Any]:
    names = [dim.name for dim in ROBOT.state]
    cameras = {
        f"observation.images.{c.name}": {"dtype": "image", "shape": (c.height, c.width, 3)} for c in ROBOT.cameras
    }
    return {"observation.state": {"dtype": "float32", "shape": (len(names),), "names": names}, **cameras}


def _progressive(frame: Any) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "JPEG", progressive=True)
    return stream.getvalue()


def _rollout(images: Any, state: Any) -> bytes:
    robot = replace(ROBOT, tasks=TASKS[:1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "e.mcap"
        recorder = Recorder(path, EpisodeInfo(robot, TASKS[0], "press", 0, "e"), wait=True)
        for step in range(2):
            recorder.step(StepRecord(step, 0.05 * step, state, state, images, None, -1))
        error = recorder.close(Outcome(True, 2, "success"))
        assert error is None
        return path.read_bytes()


if __name__ == "__main__":
    write_seeds()
