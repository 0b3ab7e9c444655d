"""Engines behind one call: numpy inputs in host memory -> actions in host memory. Everything between is timed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from exporters.repository import ExportOptions, export_checkpoint
from recap_model.policy.load import load_policy
from services.common.repository import open_model

Inputs = dict[str, NDArray[np.generic]]
Run = Callable[[Inputs], NDArray[np.float32]]


@dataclass(frozen=True)
class Wanted:
    """One row: what to run, on how many samples, with how much guidance."""

    model: str
    engine: str
    batch: int
    cameras: int
    beta: float
    threads: int


def number_format(engine: str, on_gpu: bool) -> str:
    """Of the matrix products."""
    if engine == "torch" and on_gpu:
        return "bf16"
    return {"torch-bf16": "bf16", "onnxruntime-fp16": "fp16", "onnxruntime-int8": "int8"}.get(engine, "fp32")


def open_runner(wanted: Wanted, checkpoint: Path, cache: Path) -> Run | None:
    """The engine ready to be called; None where it cannot run this row, or is not installed."""
    if wanted.engine == "lerobot":
        return _lerobot(wanted, checkpoint, cache)
    if wanted.engine.startswith("torch"):
        return _torch(wanted, checkpoint, cache)
    return _onnxruntime(wanted, checkpoint, cache)


def reference(checkpoint: Path, inputs: Inputs) -> NDArray[np.float32]:
    """What the checkpoint itself computes for sample 0, in fp32 on the CPU."""
    policy, _ = load_policy(checkpoint)
    first = {name: torch.from_numpy(value[:1]) for name, value in inputs.items()}
    with torch.no_grad():
        call = policy.sample_actions_guided if "beta" in first else policy.sample_actions
        return call(**first).numpy()[0]


def _repository(checkpoint: Path, cache: Path, options: ExportOptions) -> Path:
    """Export once; later runs with the same sources find it."""
    folder = (
        cache / f"{options.target}-{options.precision}-b{max(options.batch_sizes)}{'-guided' if options.guided else ''}"
    )
    if not (folder / "policy" / "1" / "manifest.json").is_file():
        export_checkpoint(checkpoint, folder, options)
    return folder


def _name(wanted: Wanted) -> str:
    return "policy_guided" if wanted.beta > 1 else "policy"


def _onnxruntime(wanted: Wanted, checkpoint: Path, cache: Path) -> Run:
    from services.common.onnxruntime_engine import OnnxRuntimeEngine

    precision = {"onnxruntime-fp16": "fp16", "onnxruntime-int8": "int8"}.get(wanted.engine, "fp32")
    options = ExportOptions("onnx", precision, guided=wanted.beta > 1, batch_sizes=(wanted.batch,))  # type: ignore[arg-type]
    folder = _repository(checkpoint, cache, options)
    engine = OnnxRuntimeEngine(open_model(folder, _name(wanted)), (wanted.batch,), threads=wanted.threads)
    return lambda inputs: engine.run(inputs)["actions"]


def _torch(wanted: Wanted, checkpoint: Path, cache: Path) -> Run:
    from services.common.torch_engine import TorchEngine

    torch.set_num_threads(wanted.threads)
    options = ExportOptions("torch", guided=wanted.beta > 1, batch_sizes=(wanted.batch,))
    folder = _repository(checkpoint, cache, options)
    dtype = torch.bfloat16 if wanted.engine == "torch-bf16" else None
    engine = TorchEngine(open_model(folder, _name(wanted)), dtype=dtype)
    return lambda inputs: engine.run(inputs)["actions"]


def _lerobot(wanted: Wanted, checkpoint: Path, cache: Path) -> Run | None:
    """LeRobot's own class, eager, with the same weights. It has no guidance."""
    if wanted.beta > 1:
        return None
    try:
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    except ImportError:
        return None
    from training.lerobot_export import export_policy

    torch.set_num_threads(wanted.threads)
    folder = cache / "lerobot"
    if not (folder / "config.json").is_file():
        export_policy(checkpoint, folder)
    policy = SmolVLAPolicy.from_pretrained(str(folder)).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy.to(device)
    keys = [f"observation.images.camera{i}" for i in range(wanted.cameras)]

    def run(inputs: Inputs) -> NDArray[np.float32]:
        images = torch.from_numpy(inputs["images"]).to(device).permute(1, 0, 4, 2, 3).float() / 255
        batch = dict(zip(keys, images, strict=True)) | {
            "observation.state": torch.from_numpy(inputs["state"]).to(device),
            "observation.language.tokens": torch.from_numpy(inputs["tokens"]).long().to(device),
            "observation.language.attention_mask": torch.from_numpy(inputs["token_mask"]).to(device),
        }
        noise = torch.from_numpy(inputs["noise"]).to(device)
        return policy.predict_action_chunk(batch, noise=noise).cpu().numpy()

    return run
