"""Observation in, value out. The critic reads the bare task, since the state of the world is not a matter of advice."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from recap_model import conditioning
from recap_model.observation import prepare
from recap_model.spec import CriticSpec
from services.common.batcher import Batcher
from services.common.engine import Engine, EngineError
from services.common.errors import ServiceError
from services.common.observation import Observation, task_text


@dataclass(frozen=True)
class Value:
    """value in [value_low, value_high] (-1 far, 0 success), the spread of the distribution behind it, and the seconds
    it waited and ran."""

    value: float
    std: float
    queue_s: float
    infer_s: float


class CriticPipeline:
    """Prepares observations as the training loader does, and runs them through the batcher."""

    def __init__(self, engine: Engine, batcher: Batcher) -> None:
        if not isinstance(engine.spec, CriticSpec):
            raise EngineError(f"{engine.name}: expected a critic, got a {engine.spec.kind}")
        self.spec: CriticSpec = engine.spec
        self._batcher, self._tokenizer = batcher, engine.tokenizer
        self._support = np.linspace(self.spec.value_low, self.spec.value_high, self.spec.bins)
        self._tokens = lru_cache(maxsize=1024)(self._encode)

    async def value(self, key: Hashable, observation: Observation) -> Value:
        """The value of what a robot sees. A newer observation under the same key takes the place of one that waits.

        Raises ObservationError, PromptTooLong or ServiceError.
        """
        inputs = prepare(
            observation.images, observation.state, task_text(observation.prompt), self.spec.robot, self._tokens
        )
        answer = await self._batcher.run(
            key,
            {"images": inputs.images, "state": inputs.state, "tokens": inputs.tokens, "token_mask": inputs.token_mask},
        )
        value, probabilities = float(answer.outputs["value"]), answer.outputs["probabilities"]
        if not (np.isfinite(value) and np.isfinite(probabilities).all()):
            raise ServiceError(
                "internal",
                "the critic gave NaN or infinity; not sent",
                field="value",
                expected="a finite number",
                got=str(value),
            )
        clipped = min(max(value, self.spec.value_low), self.spec.value_high)
        return Value(clipped, self._spread(probabilities), answer.queue_s, answer.infer_s)

    def _encode(self, task: str) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        return self._tokenizer(conditioning.unconditional_prompt(task))

    def _spread(self, probabilities: NDArray[np.float32]) -> float:
        mean = float(probabilities @ self._support)
        return float(np.sqrt(max(float(probabilities @ (self._support - mean) ** 2), 0.0)))
