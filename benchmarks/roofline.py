"""What the machine could do at best: measured copy bandwidth and matrix rate against the work of one chunk."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from recap_model.policy.config import PolicyConfig, SiglipConfig


@dataclass(frozen=True)
class Roofline:
    """bandwidth: bytes read plus written a second by a large copy; rate: operations a second of a large product, by
    number format; device: what was measured."""

    device: str
    bandwidth: float
    rate: dict[str, float]


@dataclass(frozen=True)
class Part:
    """flops: multiplications and additions. weights: numbers read once. activations: numbers moved at module edges."""

    name: str
    flops: float
    weights: float
    activations: float


def parts(config: PolicyConfig, batch: int, guided: bool) -> tuple[Part, ...]:
    """The work of one call: image tower, prefix, all denoising steps."""
    if not isinstance(config.vision, SiglipConfig):
        raise ValueError(f"roofline: expected SmolVLM2's tower, got {config.vision.kind!r}")
    v, t, e, branches = config.vision, config.language, config.expert, 2 if guided else 1
    patches, images = v.grid**2, batch * config.cameras
    tower = v.layers * (4 * v.width**2 + 2 * v.width * v.intermediate) + 3 * v.patch_size**2 * v.width
    connector = v.width * v.shuffle**2 * t.width
    see = 2 * images * (patches * tower + v.tokens * connector + v.layers * 2 * patches**2 * v.width)
    q, kv = t.heads * t.head_dim, t.kv_heads * t.head_dim
    length, rows = config.prefix_length, batch * branches
    layer = t.width * (2 * q + 2 * kv) + 3 * t.width * t.intermediate
    language = (t.layers - 1) * layer + t.width * 2 * kv
    read = 2 * rows * (length * language + (t.layers - 1) * 2 * length**2 * q)
    step = t.layers * (e.width * (2 * q + kv) + 3 * e.width * e.intermediate)  # half the layers have own keys, values
    attention = t.layers * 2 * config.chunk * (length + config.chunk / 2) * q
    steps = config.denoise_steps
    denoise = 2 * rows * steps * (config.chunk * step + attention)
    caches = rows * t.layers * length * 2 * kv
    return (
        Part("vision", see, tower + connector, images * (v.layers * 6 * patches * v.width)),
        Part("prefix", read, language, caches + rows * t.layers * 4 * length * t.width),
        Part("denoise", denoise, steps * step, steps * (caches + rows * t.layers * 4 * config.chunk * e.width)),
    )


def floor_seconds(work: tuple[Part, ...], roofline: Roofline, fmt: str) -> float:
    """Sum over the parts of the larger of computing and moving, at `fmt` ("fp32", "bf16", "fp16", "int8")."""
    width = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}[fmt]
    wide = 4 if fmt in ("fp32", "int8") else 2  # int8 engines keep activations in fp32
    rate = roofline.rate.get(fmt) or roofline.rate["fp32"]
    moved = [part.weights * width + part.activations * wide for part in work]
    return sum(max(p.flops / rate, m / roofline.bandwidth) for p, m in zip(work, moved, strict=True))


def measure(device: torch.device, threads: int) -> Roofline:
    """A few seconds of copies and matrix products on this machine."""
    torch.set_num_threads(threads)
    on_gpu = device.type == "cuda"
    size = 1 << 30 if on_gpu else 1 << 27
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device)
    side = 8192 if on_gpu else 2048
    rate = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)) + (
        (("fp16", torch.float16),) if on_gpu else ()
    ):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rate[name] = 2 * side**3 / _best(partial(torch.matmul, a, b), device)
    if not on_gpu:
        rate["int8"] = _int8_rate(threads)
    name = torch.cuda.get_device_name(device) if on_gpu else _cpu_name()
    return Roofline(name if on_gpu else f"{name}, {threads} threads", 2 * size / copy, rate)


def _best(call: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])


def _int8_rate(threads: int) -> float:
    """Operations a second of onnxruntime's dynamically quantised product, quantisation included."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    m, k, n = 1024, 1024, 4096
    w = numpy_helper.from_array(np.random.default_rng(0).integers(-127, 127, (k, n)).astype(np.int8), "w")
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])
    graph = helper.make_graph(nodes, "int8", [x], [y], [w])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": np.random.default_rng(0).normal(size=(m, k)).astype(np.float32)}
    return 2 * m * k * n / _best(lambda: session.run(None, feed), torch.device("cpu"))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as stream:
            names = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return "CPU"
