"""A loaded model in the policy service: its engine, the batcher that feeds it, and its pipeline."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from recap_client.spec import require_equal
from recap_model.spec import PolicySpec, Spec
from services.common.batcher import Batcher
from services.common.engine import Engine, EngineError, engine_of
from services.common.metrics import PolicyMetrics
from services.common.observation import Observation
from services.common.repository import RepositoryError, open_model
from services.common.settings import ModelSource, PolicySettings
from services.policy.pipeline import PolicyPipeline
from services.policy.session import Session


@dataclass(eq=False)
class Slot:
    """Used on the event loop. retired: it takes no new request, and ends when the last one is answered."""

    engine: Engine
    batcher: Batcher
    pipeline: PolicyPipeline
    in_flight: int = 0
    retired: bool = False

    @cached_property
    def identity(self) -> dict[str, str]:
        """name, version and content hash."""
        return {"name": self.engine.name, "version": self.engine.version, "hash": self.engine.hash}

    @contextmanager
    def used(self) -> Iterator[None]:
        """While a request is being answered by this model."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            if self.retired and not self.in_flight:
                self._close_soon()

    def retire(self) -> None:
        """Take no more requests; free the model when those under way are answered."""
        self.retired = True
        if not self.in_flight:
            self._close_soon()

    def close(self) -> None:
        """Free the model; blocks while its engine runs, a second at most."""
        self.batcher.close()
        self.engine.close()

    def _close_soon(self) -> None:
        asyncio.get_running_loop().run_in_executor(None, self.close)


def make_slot(engine: Engine, settings: PolicySettings, metrics: PolicyMetrics) -> Slot:
    """A slot for a loaded engine. Raises EngineError when it is no policy, or not for the service's guidance."""
    batcher = Batcher(
        engine,
        on_batch=metrics.batch_size.observe,
        on_busy=metrics.engine_busy.inc,
        on_refused=lambda when: metrics.refused_deadlines.labels(when).inc(),
    )
    metrics.watch(batcher)
    try:
        unsafe = lambda kind: metrics.unsafe.labels(kind).inc()  # noqa: E731
        pipeline = PolicyPipeline(engine, batcher, settings.beta, settings.limits, unsafe, settings.noise_scale)
    except BaseException:
        batcher.close()
        raise
    return Slot(engine, batcher, pipeline)


def policy_name(beta: float) -> str:
    """The model's folder for a guidance strength."""
    return "policy" if beta == 1.0 else "policy_guided"


def repository_at(root: Path, path: str | None) -> Path:
    """A repository below `root` (None: itself). Raises RepositoryError for one outside it, links followed."""
    folder = (root / (path or ".")).resolve()
    if not folder.is_relative_to(root.resolve()):
        raise RepositoryError(f"path: expected a folder below the service's model repository, got {str(path)[:200]!r}")
    return folder


def load_beside(source: ModelSource, beta: float, path: str | None, version: int | None, live: Engine) -> Engine:
    """Load and warm up a model that may take the place of `live`. Blocks for seconds: not for the event loop.

    Raises RepositoryError, ManifestError, EngineError, SpecError.
    """
    folder = repository_at(source.models, path)
    name = policy_name(beta)
    model = open_model(folder, name, version)
    if not model.path.resolve().is_relative_to(source.models.resolve()):
        raise RepositoryError(f"{model.path}: expected a folder below the service's model repository, got a link out")
    _check_spec(model.spec, live.spec)
    engine = engine_of(model, source.engine, source.threads)
    try:
        if set(engine.input_names) != set(live.input_names):
            raise EngineError(
                f"version {model.version}: inputs: expected those of the live model, {sorted(live.input_names)}, "
                f"got {sorted(engine.input_names)}"
            )
        engine.warm_up()
    except BaseException:
        engine.close()
        raise
    return engine


async def prove(slot: Slot) -> None:
    """Ask a model once before any robot does. Raises what the pipeline raises, for example on NaN actions."""
    robot = slot.pipeline.spec.robot
    images = {camera.name: np.zeros((camera.height, camera.width, 3), np.uint8) for camera in robot.cameras}
    prompt = robot.tasks[0] if robot.tasks else "warm up"
    session = Session("warm-up", "internal", np.random.default_rng(0))
    with slot.used():
        await slot.pipeline.act(session, Observation(images, np.zeros(len(robot.state), np.float32), prompt))


def _check_spec(spec: Spec, live: Spec) -> None:
    """What sessions were told when they connected must hold for every model that answers them."""
    if not isinstance(spec, PolicySpec) or not isinstance(live, PolicySpec):
        raise EngineError(f"spec.kind: expected a policy, got a {spec.kind}")
    require_equal(live.robot, spec.robot, what="the new model was made for another robot")
    if spec.chunk != live.chunk:
        raise EngineError(f"spec.chunk: expected {live.chunk} actions, as the live model gives, got {spec.chunk}")
