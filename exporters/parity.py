"""The parity receipt: the exported file against torch on seeded inputs, for every batch size that is served."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.precision import Precision
from exporters.wrap import Graph


class ParityError(ValueError):
    """The exported model does not compute what the checkpoint computes; nothing is published."""


@dataclass(frozen=True)
class Tolerance:
    """Largest absolute difference (physical units) and smallest cosine accepted."""

    max_abs: float = 1e-4
    cosine: float = 0.99999

    @staticmethod
    def of(precision: Precision, max_abs: float | None) -> "Tolerance":
        """What a number format can hold; half and integer formats are held to a direction unless max_abs is given."""
        cosine = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.99}[precision]
        default = 1e-4 if precision == "fp32" else float("inf")
        return Tolerance(default if max_abs is None else max_abs, cosine)


def onnx_parity(
    graph: Graph, path: Path, batch_sizes: tuple[int, ...], tolerance: Tolerance, seeds: int = 3
) -> dict[str, Any]:
    """Run `path` in onnxruntime and compare. Returns the receipt; raises ParityError above tolerance."""
    import onnxruntime

    rows: list[dict[str, Any]] = []
    for batch in batch_sizes:
        options = onnxruntime.SessionOptions()
        options.add_free_dimension_override_by_name("batch", batch)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for seed in range(seeds):
            inputs = graph.example(batch, seed)
            expected = graph.run(inputs)
            got = dict(zip(graph.outputs, session.run(list(graph.outputs), inputs), strict=True))
            for name in graph.outputs:
                rows.append({"batch": batch, "seed": seed, "output": name, **compare(expected[name], got[name])})
    return {"engine": f"onnxruntime {onnxruntime.__version__}", **judge(graph.name, rows, tolerance)}


def judge(name: str, rows: list[dict[str, Any]], tolerance: Tolerance) -> dict[str, Any]:
    """The worst of `rows` and the rows themselves; raises ParityError above tolerance."""
    worst = {"max_abs": max(r["max_abs"] for r in rows), "cosine": min(r["cosine"] for r in rows)}
    if not (worst["max_abs"] <= tolerance.max_abs and worst["cosine"] >= tolerance.cosine):
        raise ParityError(
            f"{name}: expected max abs <= {tolerance.max_abs} and cosine >= {tolerance.cosine} "
            f"against torch, got {worst}; nothing was published"
        )
    return {"against": "torch fp32", **worst, "rows": rows}


def compare(expected: np.ndarray, got: np.ndarray) -> dict[str, float]:  # type: ignore[type-arg]
    """max_abs and cosine of two arrays; a shape mismatch or a NaN counts as infinitely far."""
    if expected.shape != got.shape or not np.isfinite(got).all():
        return {"max_abs": float("inf"), "cosine": -1.0}
    a, b = expected.astype(np.float64).ravel(), got.astype(np.float64).ravel()
    cosine = float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
    return {"max_abs": float(np.abs(a - b).max()), "cosine": cosine}
