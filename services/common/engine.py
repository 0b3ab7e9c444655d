"""What runs a model: the interface that every engine implements."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from recap_model.spec import Spec
from recap_model.tokenizer import TextTokenizer
from services.common.repository import open_model

Arrays = Mapping[str, NDArray[Any]]

# kind -> "module:class", imported when asked for, so that a service needs only the library of the engine it runs.
KINDS = {
    "onnxruntime": "services.common.onnxruntime_engine:OnnxRuntimeEngine",
    "torch": "services.common.torch_engine:TorchEngine",
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

    def warm_up(self) -> None:
        """Run every batch size once, so that the first request is as fast as the others."""

    def close(self) -> None: ...


def load_engine(models: Path, model: str, kind: str = "onnxruntime", threads: int = 1) -> Engine:
    """Open `models`/`model`, verify it, and load it with the engine `kind`, on `threads` CPU threads.

    Raises EngineError (unknown kind, missing library, graph that does not load), RepositoryError, ManifestError.
    """
    if kind not in KINDS:
        raise EngineError(f"engine: expected one of {sorted(KINDS)}, got {kind!r}")
    module, _, name = KINDS[kind].partition(":")
    try:
        factory = getattr(import_module(module), name)
    except ImportError as error:
        raise EngineError(
            f"engine {kind!r}: cannot import {error.name}; install it with "
            f"`pip install 'recap-stack[{_EXTRAS.get(kind, 'serve')}]'`"
        ) from error
    engine: Engine = factory(open_model(models, model), threads=threads)
    return engine
