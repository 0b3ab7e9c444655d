"""Pickles as LeRobot's clients write them, made without importing LeRobot (which takes long)."""

import pickle
from dataclasses import dataclass, field
from typing import Any

MODULE = "lerobot.async_inference.helpers"


@dataclass
class TimedObservation:
    timestamp: float
    timestep: int
    observation: Any
    must_go: bool = False


@dataclass
class RemotePolicyConfig:
    policy_type: str
    pretrained_name_or_path: str
    lerobot_features: Any
    actions_per_chunk: Any
    device: str = "cpu"
    rename_map: Any = field(default_factory=dict)


def lerobot_pickle(value: Any, protocol: int = 4, module: str = MODULE) -> bytes:
    """A pickle in which this module's classes are LeRobot's."""
    data = pickle.dumps(value, protocol=protocol)
    here = __name__.encode()
    if protocol < 4:
        return data.replace(b"c" + here + b"\n", b"c" + module.encode() + b"\n")
    ours, theirs = (b"\x8c" + bytes([len(name)]) + name for name in (here, module.encode()))
    data = data.replace(ours, theirs, 1)
    return data[:3] + (len(data) - 11).to_bytes(8, "little") + data[11:]  # the frame has grown
