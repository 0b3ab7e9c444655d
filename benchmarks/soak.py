"""`make soak`: real services under a mixed load for an hour; memory, file descriptors, threads and heartbeats watched.

    python -m benchmarks.soak --minutes 60

Policy and critic run as `recap serve all` runs them, in processes of their own. The load (`benchmarks.soak_load`):
robots in real time through the real client, recorded; clients of openpi's protocol; peers that leave in mid-request;
bad requests. Writes samples.jsonl, soak.png and report.json to --out; Ctrl-C ends early and still reports. Exit code 1
when the verdict is bad; the report is also the last line.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import platform
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.soak_load import Load
from services.common.repository import open_model

GROWTH = 0.05
"""Part of its mean by which the memory of a process may grow between the end of the warm-up and the end. For runs of
half an hour and more: it takes the allocator of the load some minutes to settle."""

_SERVE = "import sys; from services.cli import serve; sys.exit(serve(sys.argv[1:]))"
_ARENA_MAX = -8  # of glibc's malloc.h
_SPARE = 3  # descriptors and threads by which the floor may move: a connection being taken, a pool's thread
_MIB = 1 << 20
_SAMPLES = "samples.jsonl"

Sample = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write the report, print it as the last line."""
    args = _parser().parse_args(argv)
    _one_arena()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("recap_client", "websockets"):  # the load loses connections on purpose
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    spec = open_model(args.models, "policy").spec.robot
    ports = _free_port(), _free_port()
    with (args.out / "services.log").open("w") as log:
        command = [sys.executable, "-c", _SERVE, "all", "--models", str(args.models), "--log-format", "json"]
        command += ["--policy-port", str(ports[0]), "--critic-port", str(ports[1])]
        services = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        processes = _processes(services, ports)
        load = Load(spec, *ports, robots=args.robots, openpi=args.openpi, patience_s=args.patience)
        _watch(load, processes, args)
    finally:
        services.terminate()
        try:
            services.wait(30)
        except subprocess.TimeoutExpired:
            services.kill()
    samples = [json.loads(line) for line in (args.out / _SAMPLES).read_text().splitlines()]
    report = verdict(samples, load.counts.problems, args.warm_up, args.growth) | {
        "hardware": f"{platform.machine()}, {psutil.cpu_count()} cores", "robots": args.robots, "openpi": args.openpi,
        "minutes": round(samples[-1]["t"] / 60, 2) if samples else 0.0, "exit": services.returncode,
    }  # fmt: skip
    if samples:
        _plot(samples, args.out / "soak.png")
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if report["passed"] else 1


def _one_arena() -> None:
    """One pool of memory for all threads of the load: glibc's pools, one or more a thread, each creep to a peak
    of its own for half an hour, which looks like a leak. The services keep the C library's defaults."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


def verdict(
    samples: Sequence[Sample], problems: Sequence[str], warm_up: float, allowed: float = GROWTH
) -> dict[str, Any]:
    """What the samples say. warm_up: the first part of them that does not count, 0 to 1; allowed: see `GROWTH`."""
    faults = list(problems)
    settled = [sample for sample in samples if sample["t"] >= warm_up * samples[-1]["t"]]
    if len(settled) < 6:
        faults.append(f"samples: expected 6 or more after the warm-up, got {len(settled)}")
        return {"passed": False, "faults": faults}
    growth = {}
    for name in settled[0]["processes"]:
        series = {key: np.array([s["processes"][name][key] for s in settled]) for key in ("rss_mib", "fds", "threads")}
        growth[name] = round(relative_growth(np.array([s["t"] for s in settled]), series["rss_mib"]), 4)
        if growth[name] > allowed:
            faults.append(f"memory of {name}: expected at most {allowed:.0%} growth, got {growth[name]:.1%}")
        for key in ("fds", "threads"):
            third = len(settled) // 3
            first, last = series[key][:third].min(), series[key][-third:].min()
            if last > first + _SPARE:
                faults.append(f"{key} of {name}: expected {first} as at the start, got {last}")
    counts = settled[-1]["counts"]
    for name in ("heartbeats", "episodes", "openpi requests", "refused", "left"):
        if not counts.get(name):
            faults.append(f"{name}: expected some, got none")
    if counts.get("missed heartbeats"):
        faults.append(f"heartbeats: {counts['missed heartbeats']} of {counts['heartbeats']} missed")
    return {"passed": not faults, "faults": faults, "memory_growth": growth, "counts": counts,
            "heartbeat_max_ms": max(s["latency"].get("heartbeat", {}).get("max_ms", 0.0) for s in settled),
            "last": settled[-1]["processes"]}  # fmt: skip


def relative_growth(t: "np.ndarray[Any, Any]", values: "np.ndarray[Any, Any]") -> float:
    """Rise of the straight line through (t, values) from the first t to the last, as a part of the mean value. The line
    is Theil-Sen's, the median of all slopes: one outlier does not tilt it."""
    first, second = np.triu_indices(len(t), 1)
    slope = float(np.median((values[second] - values[first]) / (t[second] - t[first])))
    return slope * float(t[-1] - t[0]) / float(values.mean())


def _watch(load: Load, processes: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Samples go to their file alone: this process is watched too, and a list of them would be its own growth."""
    began = time.monotonic()
    load.start()
    try:
        with (args.out / _SAMPLES).open("w") as stream:
            while (now := time.monotonic() - began) < 60 * args.minutes:
                time.sleep(min(args.every, max(0.1, 60 * args.minutes - now)))
                sample = _sample(time.monotonic() - began, load, processes)
                stream.write(json.dumps(sample) + "\n")
                stream.flush()
                _progress(sample, 60 * args.minutes)
    except KeyboardInterrupt:
        print("\nended early; the report covers what was measured", file=sys.stderr)
    load.stop()
    print(file=sys.stderr)


def _sample(t: float, load: Load, processes: Mapping[str, Any]) -> Sample:
    counts, latencies = load.counts.take()
    seen = {}
    for name, process in processes.items():
        try:
            with process.oneshot():
                seen[name] = {"rss_mib": round(process.memory_info().rss / _MIB, 2), "fds": process.num_fds(),
                              "threads": process.num_threads()}  # fmt: skip
        except psutil.NoSuchProcess:
            load.counts.problem(f"the {name} process is gone")
            seen[name] = {"rss_mib": 0.0, "fds": 0, "threads": 0}
    return {"t": round(t, 2), "processes": seen, "counts": counts,
            "latency": {name: _summary(values) for name, values in latencies.items() if values}}  # fmt: skip


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    milliseconds = 1000 * np.asarray(seconds)
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return {"n": len(seconds), "p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2),
            "max_ms": round(float(milliseconds.max()), 2)}  # fmt: skip


def _progress(sample: Sample, seconds: float) -> None:
    counts = sample["counts"]
    parts = sample["processes"].items()
    memory = " ".join(f"{name} {part['rss_mib']:.0f} MiB {part['fds']} fds" for name, part in parts)
    print(f"\r{sample['t']:.0f}/{seconds:.0f} s  {memory}  {counts.get('steps', 0)} steps  "
          f"{counts.get('heartbeats', 0)} heartbeats, {counts.get('missed heartbeats', 0)} missed  "
          f"{counts.get('problems', 0)} problems ", end="", file=sys.stderr, flush=True)  # fmt: skip


def _processes(services: "subprocess.Popen[bytes]", ports: tuple[int, int]) -> dict[str, Any]:
    """policy, critic, load -> process, once both services answer. Raises RuntimeError when they do not start."""
    limit = time.monotonic() + 600
    while not all(map(_ready, ports)):
        if services.poll() is not None or time.monotonic() > limit:
            raise RuntimeError("the services did not start; services.log says why")
        time.sleep(0.2)
    children = psutil.Process(services.pid).children(recursive=True)
    found = {"load": psutil.Process()}
    for name, port in zip(("policy", "critic"), ports, strict=True):
        found[name] = next(
            child for child in children
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in child.net_connections("tcp"))
        )  # fmt: skip
    return found


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as reply:
            return int(reply.status) == 200
    except OSError:
        return False


def _plot(samples: Sequence[Sample], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    t = [sample["t"] / 60 for sample in samples]
    for name in samples[0]["processes"]:
        axes[0].plot(t, [s["processes"][name]["rss_mib"] for s in samples], label=name)
        axes[1].plot(t, [s["processes"][name]["fds"] for s in samples], label=name)
    for name in ("robots", "openpi", "heartbeat"):
        axes[2].plot(t, [s["latency"].get(name, {}).get("p99_ms", np.nan) for s in samples], label=f"{name} p99")
    for axis, label in zip(axes, ("resident memory [MiB]", "file descriptors", "latency [ms]"), strict=True):
        axis.set_ylabel(label)
        axis.legend(loc="upper left")
        axis.grid(alpha=0.3)
    axes[2].set_yscale("log")
    axes[2].set_xlabel("minutes")
    figure.savefig(path, dpi=110)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--models", type=Path, default=Path("assets/model_repository"))
    parser.add_argument("--out", type=Path, default=Path("outputs/soak"))
    parser.add_argument("--robots", type=int, default=3, help="in real time, through recap-client")
    parser.add_argument("--openpi", type=int, default=2, help="clients of openpi's protocol")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--warm-up", type=float, default=0.2, help="first part of the run that does not count")
    parser.add_argument("--growth", type=float, default=GROWTH, help="of memory that is allowed; for short runs")
    parser.add_argument("--patience", type=float, default=1.0, help="seconds after which a heartbeat counts as missed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
