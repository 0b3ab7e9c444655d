"""Observation in, chunk of actions out: the one path that every front uses. Always conditioned on `positive`."""

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_model import conditioning
from recap_model.observation import prepare_images, prepare_state
from recap_model.spec import PolicySpec
from services.common.batcher import Batcher
from services.common.engine import Engine, EngineError, load_engine
from services.common.errors import ServiceError
from services.common.logs import get_logger
from services.common.observation import Observation, task_text
from services.common.settings import ActionLimits
from services.policy import chaining
from services.policy.safe_actions import SafeActions, Unsafe
from services.policy.session import Session

log = get_logger("policy")

Tokens = tuple[NDArray[np.int32], NDArray[np.bool_]]


@dataclass(frozen=True)
class Chunk:
    """actions float32 [chunk, A] in physical units, all finite; seconds in the queue and in the engine; requests that
    shared the run."""

    actions: NDArray[np.float32]
    queue_s: float
    infer_s: float
    batch: int


def load_policy_engine(models: Path, beta: float, kind: str, threads: int = 1, version: int | None = None) -> Engine:
    """The engine for a guidance strength: `policy` for 1 (no second pass), `policy_guided` above. version: None = the
    highest."""
    if not 1.0 <= beta <= 100.0:
        raise EngineError(f"beta: expected a guidance strength from 1 (none) to 100, got {beta}")
    return load_engine(models, "policy" if beta == 1.0 else "policy_guided", kind, threads, version)


class PolicyPipeline:
    """Prepares observations with the same functions as the training loader, and runs them through the batcher."""

    def __init__(
        self,
        engine: Engine,
        batcher: Batcher,
        beta: float,
        limits: ActionLimits = "clip",
        unsafe: Unsafe = lambda _: None,
        noise_scale: float = 1.0,
    ) -> None:
        if not isinstance(engine.spec, PolicySpec):
            raise EngineError(f"{engine.name}: expected a policy, got a {engine.spec.kind}")
        guided = "beta" in engine.input_names
        if guided != (beta > 1.0):
            raise EngineError(
                f"{engine.name}: expected a {'guided' if beta > 1 else 'plain'} graph for beta {beta}, "
                f"got inputs {sorted(engine.input_names)}"
            )
        self.spec: PolicySpec = engine.spec
        self._safe = SafeActions(engine.spec.robot.action, limits, unsafe)
        self._batcher = batcher
        self._noise_shape, self._noise_scale = engine.input_shapes["noise"], np.float32(noise_scale)
        self._tokenizer = engine.tokenizer
        self._guidance = np.float32(beta) if guided else None
        self._chaining = {name: engine.input_shapes[name] for name in chaining.INPUTS if name in engine.input_names}
        self._positive = lru_cache(maxsize=1024)(self._encode_positive)
        self._unconditional = lru_cache(maxsize=1024)(self._encode_unconditional)

    @property
    def rtc(self) -> bool:
        """Can the model continue a previous chunk?"""
        return bool(self._chaining)

    async def act(
        self,
        session: Session,
        observation: Observation,
        *,
        ticket: int | None = None,
        seed: int | None = None,
        seq: int = 0,
        deadline_s: float | None = None,
        runs_out_s: float | None = None,
        previous: chaining.Previous | None = None,
    ) -> Chunk:
        """The next chunk for a session.

        ticket: from `session.arrive()` when the observation came in; None = now. deadline_s: seconds from now;
        runs_out_s: until the robot has nothing left to do, see `Batcher.run`.
        previous: the chunk that the robot is executing, which this one continues.
        Raises ObservationError, PromptTooLong, or ServiceError (`superseded`, `deadline`, `internal`, ...; and
        `bad_message` for a previous chunk where the model takes none).
        """
        inputs = self._inputs(session, observation, seed, seq) | self._chained(previous)
        session.submit(session.arrive() if ticket is None else ticket)
        answer = await self._batcher.run(id(session), inputs, deadline_s=deadline_s, runs_out_s=runs_out_s)
        return Chunk(self._checked(answer.outputs["actions"]), answer.queue_s, answer.infer_s, answer.batch)

    def _inputs(self, session: Session, observation: Observation, seed: int | None, seq: int) -> dict[str, Any]:
        robot = self.spec.robot
        task = task_text(observation.prompt)
        tokens, mask = self._positive(task)
        noise = session.noise(self._noise_shape, seed, seq)
        inputs: dict[str, Any] = {
            "images": prepare_images(observation.images, robot),
            "state": prepare_state(observation.state, robot),
            "tokens": tokens,
            "token_mask": mask,
            "noise": noise if self._noise_scale == 1.0 else noise * self._noise_scale,
        }
        if self._guidance is not None:
            inputs["unconditional_tokens"], inputs["unconditional_mask"] = self._unconditional(task)
            inputs["beta"] = np.asarray(self._guidance)
        return inputs

    def _chained(self, previous: chaining.Previous | None) -> dict[str, NDArray[np.float32]]:
        if self._chaining:
            return chaining.graph_inputs(previous, self._chaining)
        if previous is not None:
            raise chaining.refusal()
        return {}

    def _encode_positive(self, task: str) -> Tokens:
        if unknown := self._tokenizer.unknown_words(task):  # cached above: said once a prompt, not once a request
            log.warning(
                "the model has never read some words of this prompt; the robot may do anything",
                prompt=task,
                unknown=", ".join(unknown),
                known_tasks=list(self.spec.robot.tasks),
            )
        return self._tokenizer(conditioning.positive_prompt(self.spec.text(task)))

    def _encode_unconditional(self, task: str) -> Tokens:
        return self._tokenizer(conditioning.unconditional_prompt(self.spec.text(task)))

    def _checked(self, actions: NDArray[Any]) -> NDArray[np.float32]:
        want = (self.spec.chunk, len(self.spec.robot.action))
        if actions.shape != want:
            raise ServiceError("internal", f"actions: expected {list(want)} from the model, got {list(actions.shape)}")
        return self._safe(actions)


def milliseconds(since: float) -> float:
    """From a `time.perf_counter` reading until now."""
    return 1000 * (time.perf_counter() - since)
