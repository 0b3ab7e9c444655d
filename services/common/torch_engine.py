"""The torch engine: a policy inside the service process, on a GPU as CUDA graphs, on the CPU as it is.

The only module of the services that imports torch; `services.common.engine` imports it by name when it is asked for.
On CUDA one run is: copies from pinned memory, one graph replay, one copy back, one synchronise. The CUDA path has not
been run on a GPU yet: what is tested without one is the padding, the staging, the checks, and that the graph creates
nothing on the host and reads nothing back (`tests/unit/services/test_torch_engine.py`).
"""

import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recap_model.policy.config import PolicyConfig
from recap_model.policy.load import read_policy
from recap_model.policy.static import GraphOptions, StaticPolicy
from recap_model.spec import Spec
from recap_model.tokenizer import TextTokenizer
from services.common.engine import Arrays, EngineError
from services.common.engine_inputs import Input, check_inputs, fitting_size, ones, timed_runs
from services.common.repository import ModelFolder

BATCH_SIZES = (1, 2, 4, 8)
_FILES = ("graph.json", "config.json", "norm_stats.json", "model.safetensors")
_EXPORT = "export with `recap export CHECKPOINT --target torch`"
_WARM_UPS = 3  # runs before a capture: kernels are chosen, compiled and given their workspaces


class _Runner(Protocol):
    """inputs: staging buffers [largest batch, ...] in host memory; `run` answers the first `size` samples of them."""

    inputs: dict[str, Tensor]

    def run(self, size: int) -> Tensor:
        """Outputs [size, ...] fp32 in host memory, valid until the next run."""


class TorchEngine:
    """device: None = the GPU if torch sees one, else the CPU. dtype of matrix products: None = bf16 on CUDA, fp32 on
    the CPU. compile: with torch.compile; None = on CUDA. Batch sizes come from the model's manifest, else BATCH_SIZES;
    on a GPU all are compiled and captured here: making the engine may take minutes, and `run` never waits for it.
    threads: CPU threads of this process's torch, None leaves them."""

    def __init__(
        self,
        model: ModelFolder,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        compile: bool | None = None,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._model = model
        self._device = _device(device)
        on_gpu = self._device.type == "cuda"
        self._dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
        self._sizes = _batch_sizes(model)
        self._run_times: dict[int, float] = {}
        module = _load(model, self._dtype, self._device)
        self._inputs = describe(module.config, module.options)
        self._vocabulary = module.config.language.vocabulary
        if on_gpu if compile is None else compile:
            _compile(module)
        runner = _Captured if on_gpu else _Plain
        try:
            self._runner: _Runner | None = runner(module, self._inputs, self._sizes, self._device)
        except RuntimeError as error:
            raise EngineError(
                f"{model.path}: torch {torch.__version__} cannot compile or capture it on {self._device}: {error}; "
                "try TorchEngine(..., compile=False), or device='cpu'"
            ) from error

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def version(self) -> str:
        return self._model.version

    @property
    def hash(self) -> str:
        return self._model.hash

    @property
    def spec(self) -> Spec:
        return self._model.spec

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._model.tokenizer

    @property
    def run_times(self) -> Mapping[int, float]:
        return self._run_times

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return self._sizes

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self._inputs)

    @property
    def input_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: item.shape for name, item in self._inputs.items()}

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products; inputs and outputs are fp32 whatever it is."""
        return self._dtype

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `Engine.run`."""
        if self._runner is None:
            raise EngineError(f"{self.name}: expected an open engine, got one after close(); load it again")
        count = check_inputs(self.name, self._inputs, inputs)
        size = fitting_size(self.name, self._sizes, count)
        self._check_tokens(inputs)
        for name in self._inputs:
            staged = self._runner.inputs[name].numpy()
            staged[:count] = inputs[name]
            staged[count:size] = inputs[name][-1]
        return {"actions": self._runner.run(size)[:count].numpy().copy()}

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""
        self._run_times = timed_runs(self._sizes, lambda size: self.run(ones(self._inputs, size)))

    def close(self) -> None:
        """Free weights, graphs and buffers; `run` is refused from then on."""
        self._runner = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_tokens(self, inputs: Arrays) -> None:
        """A token beyond the embedding would stop every later call on a GPU, not only its own."""
        for name in ("tokens", "unconditional_tokens"):
            if name in self._inputs:
                low, high = int(inputs[name].min()), int(inputs[name].max())
                if low < 0 or high >= self._vocabulary:
                    raise EngineError(
                        f"{self.name}: input {name}: expected ids in [0, {self._vocabulary}), got {low} to {high}; "
                        "use the tokenizer of this model"
                    )


def describe(config: PolicyConfig, options: GraphOptions) -> dict[str, Input]:
    """dtype and shape of one sample of every input of the graph, in its order."""
    height, width = config.frame_size
    prompt, chunk = (config.max_tokens,), config.chunk
    every: dict[str, tuple[Any, tuple[int, ...]]] = {
        "images": (np.uint8, (config.cameras, height, width, 3)),
        "state": (np.float32, (config.state_dim,)),
        "tokens": (np.int32, prompt),
        "token_mask": (np.bool_, prompt),
        "unconditional_tokens": (np.int32, prompt),
        "unconditional_mask": (np.bool_, prompt),
        "beta": (np.float32, ()),
        "noise": (np.float32, (chunk, config.padded_action)),
        "previous": (np.float32, (chunk, config.action_dim)),
        "prefix_weights": (np.float32, (chunk,)),
        "guidance_weights": (np.float32, (config.denoise_steps,)),
    }
    return {name: Input(np.dtype(every[name][0]), every[name][1]) for name in options.inputs}


class _Plain:
    """Calls the module: on the CPU, and to compare the captured path with."""

    def __init__(
        self, module: nn.Module, wanted: Mapping[str, Input], sizes: tuple[int, ...], device: torch.device
    ) -> None:
        self._module, self._device = module, device
        self.inputs = _buffers(wanted, max(sizes))

    @torch.no_grad()
    def run(self, size: int) -> Tensor:
        """See `_Runner.run`."""
        actions: Tensor = self._module(*(x[:size].to(self._device) for x in self.inputs.values()))
        return actions.float().cpu()


class _Captured:
    """One CUDA graph per batch size, largest first, so that the smaller ones live in its memory pool.

    All graphs read the same device buffers (the first `size` samples of them) and may reuse each other's memory: sound
    because a run copies its answer out and synchronises before the next begins.
    """

    def __init__(
        self, module: nn.Module, wanted: Mapping[str, Input], sizes: tuple[int, ...], device: torch.device
    ) -> None:
        self.inputs = _buffers(wanted, max(sizes), pinned=True)
        self._module = module  # the graphs hold addresses of its weights, not the weights
        self._staged = {name: x.to(device) for name, x in self.inputs.items()}
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[int, Tensor] = {}
        self._stream.wait_stream(torch.cuda.current_stream(device))
        pool: Any = None
        for size in sorted(sizes, reverse=True):
            self._capture(size, pool)
            pool = pool or self._graphs[size].pool()
        self._answer = torch.empty(self._outputs[max(sizes)].shape).pin_memory()

    @torch.no_grad()
    def _capture(self, size: int, pool: Any) -> None:
        arguments = [x[:size] for x in self._staged.values()]
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                self._module(*arguments)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            self._outputs[size] = self._module(*arguments).float()
        self._graphs[size] = graph

    @torch.no_grad()
    def run(self, size: int) -> Tensor:
        """See `_Runner.run`."""
        answer = self._answer[:size]
        with torch.cuda.stream(self._stream):
            for name, x in self.inputs.items():
                self._staged[name][:size].copy_(x[:size], non_blocking=True)
            self._graphs[size].replay()
            answer.copy_(self._outputs[size], non_blocking=True)
        self._stream.synchronize()
        return answer


def _buffers(wanted: Mapping[str, Input], size: int, *, pinned: bool = False) -> dict[str, Tensor]:
    """Host tensors [size, ...] of ones for every input."""
    made = {name: torch.from_numpy(array) for name, array in ones(wanted, size).items()}
    return {name: x.pin_memory() for name, x in made.items()} if pinned else made


def _compile(module: StaticPolicy) -> None:
    """Compile what runs before the steps, and one step's velocity, once for all steps: the whole graph would compile
    the expert anew for each. Inductor's own CUDA graphs are off, because the engine captures."""
    for name in ("prepare", "velocity"):
        compiled = torch.compile(
            getattr(module, name), dynamic=False, fullgraph=True, options={"triton.cudagraphs": False}
        )
        setattr(module, name, compiled)


def _load(model: ModelFolder, dtype: torch.dtype, device: torch.device) -> StaticPolicy:
    """The static graph of a version folder on `device`."""
    missing = [name for name in _FILES if not (model.path / name).is_file()]
    if missing:
        raise EngineError(
            f"{model.path}: expected the files {', '.join(_FILES)}, got no {', '.join(missing)}; {_EXPORT}"
        )
    graph = json.loads((model.path / "graph.json").read_text())
    if not isinstance(graph, dict) or not all(isinstance(graph.get(k), bool) for k in ("guided", "rtc")):
        raise EngineError(
            f"{model.path / 'graph.json'}: expected true or false for guided and rtc, got {graph}; {_EXPORT}"
        )
    options = GraphOptions(guided=graph["guided"], rtc=graph["rtc"], dtype=dtype, attention="sdpa")
    try:
        policy = read_policy(model.path)
    except (ValueError, OSError) as error:
        raise EngineError(f"{model.path}: the torch engine cannot load it: {error}") from error
    return StaticPolicy(policy, options).eval().requires_grad_(False).to(device)


def _device(wanted: str | torch.device | None) -> torch.device:
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type not in ("cuda", "cpu"):
        raise EngineError(f"device: expected 'cuda', 'cuda:N' or 'cpu', got {str(device)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"device: expected a GPU that torch sees, got none for {str(device)!r}; use device='cpu'")
    return device


def _batch_sizes(model: ModelFolder) -> tuple[int, ...]:
    """Ascending, from the manifest."""
    sizes = model.manifest.parameters.get("batch_sizes", BATCH_SIZES)
    if not isinstance(sizes, list | tuple) or not sizes or not all(type(s) is int and s > 0 for s in sizes):
        raise EngineError(
            f"{model.path}: manifest: batch_sizes: expected positive whole numbers, got {sizes!r}; {_EXPORT}"
        )
    return tuple(sorted(set(sizes)))
