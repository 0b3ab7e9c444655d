"""`recap bench engine`: every engine on the same inputs, wall clock with host copies, beside the machine's own limits.

Each engine runs in a process of its own: its memory is its own, and nothing stays in a cache of another's. argparse and
not tyro: this also runs on a bare GPU machine as `PYTHONPATH=.:clients python3 -m benchmarks.engine`, with numpy,
torch, onnx, onnxruntime, safetensors, tokenizers and rich, without lerobot and without a network.
"""

import argparse
import hashlib
import itertools
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.page import append

MARKER = "row: "
ENGINES = ("lerobot", "torch", "torch-bf16", "onnxruntime", "onnxruntime-fp16", "onnxruntime-int8")


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, append it to --append, and print one JSON object as the last line."""
    args = _parser().parse_args(argv)
    if args.child:
        return _child(json.loads(args.child), Path(args.cache))
    import torch

    from benchmarks.roofline import measure

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = args.threads or torch.get_num_threads()
    print("measuring copy bandwidth and matrix rate", file=sys.stderr)
    roofline = measure(device, threads)
    rows: list[dict[str, Any]] = []
    for engine in args.engines:
        for model, batch, cameras, beta in itertools.product(args.models, args.batches, args.cameras, args.betas):
            wanted = {"model": model, "engine": engine, "batch": batch, "cameras": cameras, "beta": beta}
            print(f"{engine}: {model}, batch {batch}, {cameras} cameras, beta {beta:g}", file=sys.stderr, flush=True)
            job = {**wanted, "threads": threads, "repeats": args.repeats, "warm_up": args.warm_up}
            rows.append(_measure(job, args.cache, asdict(roofline)))
    _compare(rows)
    text = _table(rows, roofline.device, asdict(roofline))
    print(text)
    if args.append:
        append(Path(args.append), text)
    print(json.dumps({"hardware": roofline.device, "threads": threads, "roofline": asdict(roofline), "rows": rows}))
    return 0 if any("p50_ms" in row for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recap bench engine", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["smolvla_base"], help="smolvla_base (450 M) or smolvla_debug")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="samples a call, 1 to 8")
    parser.add_argument("--cameras", nargs="+", type=int, default=[1])
    parser.add_argument("--betas", nargs="+", type=float, default=[1.0], help="guidance; above 1 lerobot has no row")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls a row")
    parser.add_argument("--warm-up", type=int, default=3, help="calls before the clock counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of every engine; 0 = torch's default")
    parser.add_argument("--cache", default="runs/bench", help="exported models are kept here between runs")
    parser.add_argument("--append", help="file to put the table into, e.g. docs/benchmarks.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _measure(job: dict[str, Any], cache: str, roofline: dict[str, Any]) -> dict[str, Any]:
    """One row: a process that exports, then one that measures; a row that could not be had says why."""
    for stage in ("prepare", "measure"):
        payload = json.dumps(job | {"limits": roofline, "prepare": stage == "prepare"})
        command = [sys.executable, "-m", "benchmarks.engine", "--cache", cache, "--child", payload]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            break
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
    row: dict[str, Any] = {k: job[k] for k in ("model", "engine", "batch", "cameras", "beta")}
    if done.returncode or not lines:
        return row | {"not_measured": f"the engine's process ended with {done.returncode}; its message is above"}
    return row | json.loads(lines[-1].removeprefix(MARKER))


def _child(job: dict[str, Any], cache: Path) -> int:
    import torch

    from benchmarks.models import config_of, make_inputs, write_random_checkpoint
    from benchmarks.roofline import Roofline, floor_seconds, parts
    from benchmarks.runners import Wanted, number_format, open_runner, reference
    from exporters.parity import compare
    from recap_model.checkpoint import read_checkpoint

    repeats, warm_up, limits = job.pop("repeats"), job.pop("warm_up"), Roofline(**job.pop("limits"))
    prepare = job.pop("prepare")
    wanted = Wanted(**job)
    torch.set_num_threads(wanted.threads)
    home = cache.absolute() / f"{wanted.model}-{wanted.cameras}-{_sources()}"
    checkpoint = home / "checkpoint"
    if not checkpoint.is_dir():
        write_random_checkpoint(wanted.model, wanted.cameras, checkpoint)
    config = config_of(wanted.model, wanted.cameras)
    inputs = make_inputs(config, read_checkpoint(checkpoint, "policy").tokenizer, wanted.batch, wanted.beta)
    before = time.perf_counter()
    run = open_runner(wanted, checkpoint, home)
    if run is None:
        why = "no guidance in LeRobot's class" if wanted.beta > 1 else "lerobot is not installed"
        print(MARKER + json.dumps({"not_measured": why}))
        return 0
    opened = time.perf_counter() - before
    if prepare:
        return 0
    actions = run(inputs)
    times = np.array([_timed(run, inputs) for _ in range(warm_up + repeats)][warm_up:])
    memory = _memory_mb()  # before the reference loads a second model
    difference = compare(_reference(home, checkpoint, inputs, wanted, reference), actions[0])
    on_gpu = torch.cuda.is_available() and not wanted.engine.startswith("onnxruntime")
    fmt = number_format(wanted.engine, on_gpu)
    floor = floor_seconds(parts(config, wanted.batch, wanted.beta > 1), limits, fmt)
    p50, p90, p99 = np.percentile(times, [50, 90, 99])
    row = {
        "steps": config.denoise_steps, "format": fmt, "p50_ms": 1e3 * p50, "p90_ms": 1e3 * p90, "p99_ms": 1e3 * p99,
        "chunks_per_s": wanted.batch / p50, "roofline_share": floor / p50, "memory_mb": memory, "open_s": opened,
        "max_abs": difference["max_abs"], "cosine": difference["cosine"], "action_std": float(actions[0].std()),
    }  # fmt: skip
    print(MARKER + json.dumps({k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()}))
    return 0


def _timed(run: Any, inputs: Any) -> float:
    start = time.perf_counter()
    run(inputs)
    return time.perf_counter() - start


def _reference(home: Path, checkpoint: Path, inputs: Any, wanted: Any, reference: Any) -> Any:
    """The checkpoint's own actions for sample 0: computed once for all engines."""
    path = home / f"reference-{wanted.beta:g}.npy"
    if not path.is_file():
        np.save(path, reference(checkpoint, inputs))
    return np.load(path)


def _memory_mb() -> float:
    """On the GPU where the engine uses one: its peak there; else what this process holds after the timed calls."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _sources() -> str:
    """Hash of what shapes an exported model, so that the cache never serves an old one."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for pattern in ("recap_model/policy/*.py", "exporters/*.py", "benchmarks/models.py"):
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def _compare(rows: list[dict[str, Any]]) -> None:
    """Beside every row the ratio to LeRobot's on the same work."""
    key = ("model", "batch", "cameras", "beta")
    base = {tuple(r[k] for k in key): r["p50_ms"] for r in rows if r["engine"] == "lerobot" and "p50_ms" in r}
    for row in rows:
        peer = base.get(tuple(row[k] for k in key))
        if peer and "p50_ms" in row:
            row["times_lerobot"] = round(peer / row["p50_ms"], 2)


def _table(rows: list[dict[str, Any]], hardware: str, limits: dict[str, Any]) -> str:
    from recap_model.manifest import source_commit

    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in limits["rate"].items())
    head = [
        f"## {datetime.now(UTC):%Y-%m-%d}, engines, {hardware}",
        "",
        f"`recap bench engine`, commit {source_commit()[:10]}; copy {limits['bandwidth'] / 1e9:.1f} GB/s, "
        f"products in GFLOP/s {rates}. Random weights; wall clock with host copies; difference from the "
        "checkpoint's own fp32 forward on the same noise.",
        "",
        "| model | engine | batch | cameras | beta | p50 ms | p90 | p99 | chunks/s | of roofline | memory MB "
        "| max abs (action std) | cosine | x LeRobot |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(head + [_line(row) for row in rows]) + "\n"


def _line(row: dict[str, Any]) -> str:
    what = f"| {row['model']} | {row['engine']} | {row['batch']} | {row['cameras']} | {row['beta']:g} |"
    if "p50_ms" not in row:
        return f"{what} not measured: {row['not_measured']} | | | | | | | | |"
    return (
        f"{what} {row['p50_ms']:.1f} | {row['p90_ms']:.1f} | {row['p99_ms']:.1f} | {row['chunks_per_s']:.2f} | "
        f"{row['roofline_share']:.0%} | {row['memory_mb']:,.0f} | {row['max_abs']:.1e} ({row['action_std']:.2f}) | "
        f"{row['cosine']:.6f} | {row.get('times_lerobot', '')} |"
    )


if __name__ == "__main__":
    sys.exit(main())
