"""What runs a model: the interface that every engine implements."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from recap_model.spec import Spec
from recap_model.tokenizer import TextTokenizer
from services.common.repository import ModelFolder, open_model

Arrays = Mapping[str, NDArray[Any]]

# kind -> "module:class", imported when asked for, so that a service needs only the library of the engine it runs.
KINDS = {
    "onnxruntime": "services.common.onnxruntime_engine:OnnxRuntimeEngine",
    "torch": "services.common.torch_engine:TorchEngine",
    "triton": "services.common.triton_engine:TritonEngine",
}
_EXTRAS = {"torch": "serve,torch"}  # engines that need more than the extra `serve`


class EngineError(ValueError):
    """An engine cannot be made, or was called with inputs that its graph does not take."""


class Engine(Protocol):
    """A loaded model. `run` is called from one thread at a time and may block; nothing here is for the event loop."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def hash(self) -> str:
        """Content hash of the model folder, hex."""

    @property
    def spec(self) -> Spec: ...

    @property
    def tokenizer(self) -> TextTokenizer: ...

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Ascending; the last is the most samples that one `run` takes."""

    @property
    def input_names(self) -> tuple[str, ...]: ...

    @property
    def input_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one sample of each input, without the batch dimension."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs for a batch: every array [B, ...], any 1 <= B <= batch_sizes[-1] (padded up to the next size inside).

        Raises EngineError when an input is missing or has another dtype or shape than the graph's.
        """

    @property
    def run_times(self) -> Mapping[int, float]:
        """Seconds of a run by batch size, as `warm_up` has measured them; empty before."""

    def warm_up(self) -> None:
        """Run every batch size, so that the first request is as fast as the others, and measure a run of each."""

    def close(self) -> None: ...


@runtime_checkable
class TimedEngine(Protocol):
    """An engine that runs elsewhere, and can be told how long its answer is worth anything."""

    def run_within(self, inputs: Arrays, seconds: float | None) -> dict[str, NDArray[Any]]:
        """`Engine.run`, ended after `seconds` (None = the engine's own limit). Also raises ServiceError: `deadline`
        when they have passed, `unavailable` when there is nobody to ask."""


def load_engine(
    models: Path, model: str, kind: str = "onnxruntime", threads: int = 1, version: int | None = None
) -> Engine:
    """Open `models`/`model`, verify it, and load it with the engine `kind`, on `threads` CPU threads. version: None =
    the highest.

    Raises EngineError (unknown kind, missing library, graph that does not load), RepositoryError, ManifestError.
    """
    _check_kind(kind)  # first: hashing a large model takes a while
    return engine_of(open_model(models, model, version), kind, threads)


def engine_of(model: ModelFolder, kind: str = "onnxruntime", threads: int = 1) -> Engine:
    """Load an opened model, which may take seconds. kind: of `KINDS`; `triton@URL` for a Triton elsewhere than at its
    usual port of this machine. Raises EngineError."""
    _check_kind(kind)
    kind, _, url = kind.partition("@")
    module, _, name = KINDS[kind].partition(":")
    try:
        factory = getattr(import_module(module), name)
    except ImportError as error:
        raise EngineError(
            f"engine {kind!r}: cannot import {error.name}; install it with "
            f"`pip install 'recap-stack[{_EXTRAS.get(kind, 'serve')}]'`"
        ) from error
    engine: Engine = factory(model, threads=threads, **({"url": url} if url else {}))
    return engine


def _check_kind(kind: str) -> None:
    name, at, _ = kind.partition("@")
    if name not in KINDS or (at and name != "triton"):
        raise EngineError(f"engine: expected one of {sorted(KINDS)}, got {kind!r}")
