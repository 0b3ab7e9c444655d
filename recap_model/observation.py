"""Raw observation -> model inputs. The training loader and the services call these same functions, so that a frame
reaches the model as the same bytes on both paths. Normalisation is not here: it lives in the model's graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_client.spec import RobotSpec

Tokenize = Callable[[str], tuple[NDArray[np.int32], NDArray[np.bool_]]]
"""Text -> ids and mask: a `TextTokenizer`, or a cache before one."""


class ObservationError(ValueError):
    """An observation does not fit the spec. `field` names the part; the message says what was expected and came."""

    def __init__(self, field: str, expected: str, got: str) -> None:
        super().__init__(f"observation.{field}: expected {expected}, got {got}")
        self.field, self.expected, self.got = field, expected, got


@dataclass(frozen=True)
class ModelInputs:
    """One sample, no batch dimension.

    images uint8 [cameras, H, W, 3] in spec order; state float32 [S] in physical units;
    tokens int32 [L]; token_mask bool [L].
    """

    images: NDArray[np.uint8]
    state: NDArray[np.float32]
    tokens: NDArray[np.int32]
    token_mask: NDArray[np.bool_]


def prepare_images(images: Mapping[str, Any], robot: RobotSpec) -> NDArray[np.uint8]:
    """Check and stack camera frames in spec order: uint8 [cameras, H, W, 3]. Extra cameras are ignored."""
    frames = []
    for camera in robot.cameras:
        frame = images.get(camera.name)
        shape = camera.height, camera.width, 3
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.shape != shape:
            got = f"no such camera among {sorted(images)}" if frame is None else _kind(frame)
            raise ObservationError(f"images[{camera.name}]", f"uint8 {list(shape)}", got)
        frames.append(frame[None])
    return np.concatenate(frames)


def _kind(frame: Any) -> str:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
        return f"{getattr(frame, 'dtype', type(frame).__name__)}"
    return f"uint8 {list(frame.shape)}"


def prepare_state(state: Any, robot: RobotSpec) -> NDArray[np.float32]:
    """Check the state vector: float32 [S], finite."""
    try:
        vector = np.asarray(state, np.float32)
    except (TypeError, ValueError) as error:
        raise ObservationError("state", _wanted(robot), type(state).__name__) from error
    if vector.shape != (len(robot.state),):
        raise ObservationError("state", _wanted(robot), f"shape {list(vector.shape)}")
    if not np.isfinite(vector).all():
        bad = [dim.name for dim, value in zip(robot.state, vector, strict=True) if not np.isfinite(value)]
        raise ObservationError("state", _wanted(robot), f"NaN or infinity in {', '.join(bad)}")
    return vector


def _wanted(robot: RobotSpec) -> str:
    return f"{len(robot.state)} finite numbers ({', '.join(dim.name for dim in robot.state)})"


def prepare(images: Mapping[str, Any], state: Any, prompt: str, robot: RobotSpec, tokenizer: Tokenize) -> ModelInputs:
    """Check one raw observation against `robot` and tokenise `prompt` (from `recap_model.conditioning`).

    images: camera name -> uint8 [H, W, 3]; state: [S] in physical units. Raises ObservationError.
    """
    tokens, mask = tokenizer(prompt)
    return ModelInputs(prepare_images(images, robot), prepare_state(state, robot), tokens, mask)
