"""Engines to measure a service with: one without a model, and the shipped model behind any robot's observations."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.serve.payloads import Payload
from benchmarks.serve.standalone.sample import ACTIONS, CHUNK
from recap_model.spec import PolicySpec
from recap_model.tokenizer import word_tokenizer
from services.common.engine import Arrays, Engine
from services.policy.pipeline import load_policy_engine

_MAX_TOKENS = 16
_BATCHES = (1, 2, 4, 8)


class NullEngine:
    """Zeros at once: what a request then takes is the service's own."""

    name, version, hash = "null", "0", "0" * 64
    batch_sizes: tuple[int, ...] = _BATCHES
    run_times: Mapping[int, float] = MappingProxyType({})

    def __init__(self, payload: Payload) -> None:
        self.spec = PolicySpec(payload.robot, CHUNK, _MAX_TOKENS)
        self.tokenizer = word_tokenizer(payload.robot.tasks, _MAX_TOKENS)
        self.input_shapes: Mapping[str, tuple[int, ...]] = {
            "images": (payload.cameras, payload.height, payload.width, 3),
            "state": (len(payload.robot.state),),
            "tokens": (self.spec.max_tokens,),
            "token_mask": (self.spec.max_tokens,),
            "noise": (CHUNK, ACTIONS),
        }
        self.input_names = tuple(self.input_shapes)

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Engine.run`."""
        return {"actions": np.zeros((len(inputs["state"]), CHUNK, ACTIONS), np.float32)}

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        pass


class TinyEngine(NullEngine):
    """The `policy` of a model repository, on frames thinned out to its own size and the first entries of the state; its
    actions fill the first rows and columns of the chunk. The work is real, the actions mean nothing."""

    name = "tiny"

    def __init__(self, payload: Payload, models: Path) -> None:
        super().__init__(payload)
        self._model: Engine = load_policy_engine(models, 1.0, "onnxruntime")
        self._model.warm_up()
        self.batch_sizes, self.run_times = self._model.batch_sizes, self._model.run_times
        shapes = self._model.input_shapes
        self._cameras, height, width, _ = shapes["images"]
        self._rows = np.linspace(0, payload.height - 1, height).astype(int)
        self._columns = np.linspace(0, payload.width - 1, width).astype(int)
        self._which = np.arange(self._cameras) % payload.cameras
        ids, mask = self._model.tokenizer("")
        self._tokens = ids, mask | True  # what the words are does not matter to how long they take

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Engine.run`."""
        count, shapes = len(inputs["state"]), self._model.input_shapes
        ids, mask = (np.broadcast_to(part, (count, *part.shape)) for part in self._tokens)
        feed = {
            "images": inputs["images"][:, self._which][:, :, self._rows][:, :, :, self._columns],
            "state": np.ascontiguousarray(inputs["state"][:, : shapes["state"][0]]),
            "tokens": ids,
            "token_mask": mask,
            "noise": np.ascontiguousarray(inputs["noise"][:, : shapes["noise"][0], : shapes["noise"][1]]),
        }
        feed |= {name: np.zeros((count, *shapes[name]), np.float32) for name in shapes if name not in feed}
        got = self._model.run(feed)["actions"]
        actions = super().run(inputs)
        actions["actions"][:, : got.shape[1], : got.shape[2]] = got
        return actions

    def close(self) -> None:
        self._model.close()
