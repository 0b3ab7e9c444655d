"""ONNX -> TensorRT plan, and whether a plan fits this machine.

Written for the Python API of TensorRT 11 (10.12 and later should do). It has not been run: neither TensorRT nor a GPU
was at hand, and the tests stop at the library's boundary, where a recording stand-in checks order and arguments.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

PROFILES = ((1, 1, 8),)  # (smallest, tuned for, largest) batch: robots ask one by one
_IDENTITY = ("tensorrt", "gpu", "compute_capability")

Profile = tuple[int, int, int]


class TensorRtError(ValueError):
    """TensorRT is missing, rejects a graph, or a plan was built for another machine."""


def build_plan(
    onnx_path: Path,
    plan_path: Path,
    profiles: Sequence[Profile] = PROFILES,
    timing_cache: Path | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Build `plan_path` from a graph whose one symbolic dimension is the batch, first in every input.

    profiles: (min, opt, max) batch of each optimisation profile. timing_cache: file that later builds on the same kind
    of GPU read and extend, or None. log: called with TensorRT's warnings and errors, one line each.
    Returns what the manifest records: {"tensorrt", "gpu", "compute_capability", "profiles"}.
    Raises TensorRtError; neither file is touched then.
    """
    for profile in profiles or ((0, 0, 0),):
        if not 1 <= profile[0] <= profile[1] <= profile[2]:
            raise TensorRtError(f"profiles: expected 1 <= min <= opt <= max batch, got {list(profiles)}")
    trt = _library()
    here = this_machine()
    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    _parse(trt, network, logger, onnx_path)
    config = builder.create_builder_config()
    for profile in profiles:
        _add_profile(builder, config, network, profile, onnx_path)
    if timing_cache is not None:
        _read_cache(config, timing_cache, log)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise TensorRtError(
            f"{onnx_path}: expected a plan from TensorRT {here['tensorrt']} on {here['gpu']}, got none; its "
            "reasons are in the log above, and `trtexec --onnx=... --verbose` tells more"
        )
    _write(plan_path, plan)
    if timing_cache is not None:
        _write(timing_cache, config.get_timing_cache().serialize())
    return {**here, "profiles": [list(profile) for profile in profiles]}


def this_machine() -> dict[str, str]:
    """{"tensorrt": version, "gpu": name, "compute_capability": e.g. "9.0"}. Raises TensorRtError without either."""
    trt = _library()
    import torch

    if not torch.cuda.is_available():
        raise TensorRtError(
            "tensorrt: expected a GPU, got none that torch sees: a plan is built on the GPU that runs it; "
            "export there, or with `--target onnx`"
        )
    major, minor = torch.cuda.get_device_capability()
    return {
        "tensorrt": str(trt.__version__),
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
    }


def require_fitting(recorded: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse a plan (what `build_plan` returned) on a machine (`this_machine`) other than the one it was built on.

    A plan holds machine code for one GPU and one TensorRT version. Raises TensorRtError with expected and got.
    """
    wrong = [
        f"{name}: expected {recorded.get(name, 'nothing recorded')} (plan), got {here.get(name)} (this machine)"
        for name in _IDENTITY
        if name not in recorded or recorded[name] != here.get(name)
    ]
    if wrong:
        raise TensorRtError(
            f"TensorRT plan: built for another machine: {'; '.join(wrong)}; "
            "build it here: `recap export CHECKPOINT --target tensorrt --out MODELS`"
        )


def _library() -> ModuleType:
    try:
        import tensorrt
    except ImportError as error:
        raise TensorRtError(
            f"tensorrt: expected the library TensorRT, got no module ({error}); install it on the machine with the "
            "GPU: `pip install tensorrt`"
        ) from error
    library: ModuleType = tensorrt
    return library


def _network_flags(trt: ModuleType) -> int:
    """Strongly typed: number formats are the graph's. TensorRT 10 asks for it by a flag; 11 knows nothing else."""
    flag = getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _logger(trt: ModuleType, log: Callable[[str], None]) -> Any:
    loud = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR, trt.ILogger.Severity.WARNING)

    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in loud:
                log(f"tensorrt: {msg}")

    return Logger()


def _parse(trt: ModuleType, network: Any, logger: Any, path: Path) -> None:
    """Read from the file, not from bytes: weights beside the graph are found by its path."""
    if not path.is_file():
        raise TensorRtError(f"{path}: expected an ONNX file, got none; export with `--target onnx` first")
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)] or ["no reason given"]
        raise TensorRtError(
            f"{path}: expected a graph that TensorRT {trt.__version__} reads, got {len(errors)} errors: "
            + "; ".join(errors)
        )


def _add_profile(builder: Any, config: Any, network: Any, profile: Profile, path: Path) -> None:
    made = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        item = network.get_input(i)
        shape = tuple(int(extent) for extent in item.shape)
        if not shape or shape[0] != -1 or -1 in shape[1:]:
            raise TensorRtError(
                f"{path}: input {item.name}: expected a symbolic batch first and fixed extents after it, "
                f"got {list(shape)}"
            )
        made.set_shape(item.name, *((batch, *shape[1:]) for batch in profile))
    if config.add_optimization_profile(made) < 0:
        raise TensorRtError(
            f"{path}: profile {profile}: expected TensorRT to accept it, got a refusal; see the log above"
        )


def _read_cache(config: Any, path: Path, log: Callable[[str], None]) -> None:
    """Timings of earlier builds. One from another machine or version is left aside, and replaced after the build."""
    data = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(data), False):
        log(f"tensorrt: {path}: timing cache of another machine or version; starting an empty one")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _write(path: Path, data: Any) -> None:
    """Whole or not at all. data: anything with the buffer protocol."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
