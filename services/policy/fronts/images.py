"""openpi's conventions for camera frames -> uint8 [H, W, 3]."""

from typing import Any

import numpy as np

from recap_model.observation import ObservationError


def as_hwc_uint8(frame: Any, field: str) -> Any:
    """Channels may come first, and floats in [0, 1] stand for 0..255 (truncated, as openpi does).

    Anything else passes unchanged, for the check against the spec to judge. Raises ObservationError on floats out of
    range, which would wrap around.
    """
    if not isinstance(frame, np.ndarray) or frame.ndim != 3:
        return frame
    if frame.dtype.kind == "f":
        if not (np.isfinite(frame).all() and frame.min(initial=0) >= 0 and frame.max(initial=0) <= 1):
            raise ObservationError(field, "uint8, or floats from 0 to 1", "floats out of that range")
        frame = (255 * frame).astype(np.uint8)
    if frame.shape[0] == 3 and frame.shape[2] != 3:
        frame = np.ascontiguousarray(frame.transpose(1, 2, 0))
    return frame
