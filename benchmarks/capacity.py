"""How many robots one engine can serve, and how many engines a fleet needs: `python -m benchmarks.capacity ...`.

A queueing model, simulated: robots ask at a fixed rate with phases drawn by a seeded generator, one server runs
batches, and which requests share a run is decided by the service's own scheduler (`services.common.schedule`). A run of
so many samples takes what was measured (`--run-ms 1=3.3,8=15.4`, or `--measured`, a file with the output of
`benchmarks.fleet`) times log-normal noise; the way to the engine and back is added to every answer. A robot that still
waits at its next tick misses that tick.

`--check`: the model by the closed loops of such a run, beside what its robots saw at their rate. The last line is JSON.
"""

import argparse
import heapq
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.common.schedule import RunTimes, Turn, make_turn, next_run

_WARM_UP_SHARE = 0.2


@dataclass(frozen=True)
class Engine:
    """run_s: batch size -> seconds of a run. overhead_s: of the service for each request, while the engine is idle.
    path_s: of each request beside the engine's work. spread: standard deviation of the logarithm of run and path."""

    run_s: Mapping[int, float]
    overhead_s: float = 0.0
    path_s: float = 0.0
    spread: float = 0.0

    @property
    def per_s(self) -> float:
        """The most requests a second, at the best batch size."""
        return max(size / (seconds + size * self.overhead_s) for size, seconds in self.run_s.items())


@dataclass(frozen=True)
class Load:
    """What robots of one engine saw. Times in milliseconds from the tick to the answer; missed_share: of all ticks."""

    robots: int
    requests_per_s: float
    utilisation: float
    mean_batch: float
    p50_ms: float
    p99_ms: float
    missed_share: float


def simulate(engine: Engine, robots: int, hz: float, seconds: float, seed: int = 0) -> Load:
    """One engine and its robots. Deterministic for a seed; the first fifth of the time is not counted."""
    generator = np.random.default_rng(seed)
    times = RunTimes(sorted(engine.run_s))
    events = [(float(phase), number) for number, phase in enumerate(generator.uniform(0.0, 1.0 / hz, robots))]
    heapq.heapify(events)
    waiting: list[tuple[Turn, int]] = []
    now = busy = 0.0
    trips: list[float] = []
    runs = missed = 0
    start = seconds * _WARM_UP_SHARE
    while events or waiting:
        if not waiting:
            now = max(now, events[0][0])
        while events and events[0][0] <= now:
            due, number = heapq.heappop(events)
            waiting.append((make_turn(due, deadline_s=None, runs_out_s=None, replaced=None), number))
        chosen = next_run([turn for turn, _ in waiting], times, now).chosen
        took = engine.run_s[times.size(len(chosen))] * math.exp(generator.normal(0.0, engine.spread))
        times.record(len(chosen), took, now + took)
        end = now + took + len(chosen) * engine.overhead_s
        counted = start <= now < seconds
        runs, busy = runs + counted, busy + (end - now) * counted
        for position in chosen:
            turn, number = waiting[position]
            answered = end + engine.path_s * math.exp(generator.normal(0.0, engine.spread)) - turn.arrived
            passed = int(answered * hz)
            following = turn.arrived + (1 + passed) / hz
            if counted:
                trips.append(answered)
                missed += passed
            if following < seconds:
                heapq.heappush(events, (following, number))
        for turn, _ in waiting:
            turn.passed += 1
        taken = set(chosen)
        waiting = [item for position, item in enumerate(waiting) if position not in taken]
        now = end
    if not trips:
        raise ValueError(f"seconds: expected enough for a request of {hz:g} Hz after the warm-up, got {seconds:g}")
    p50, p99 = (round(1000 * float(np.percentile(trips, q)), 3) for q in (50, 99))
    per_s = len(trips) / (seconds - start)
    return Load(
        robots, round(per_s, 1), round(busy / (seconds - start), 3), round(len(trips) / max(runs, 1), 2), p50, p99,
        round(missed / (len(trips) + missed), 5),
    )  # fmt: skip


def robots_per_engine(engine: Engine, hz: float, p99_ms: float, seconds: float, seed: int = 0) -> Load:
    """The most robots whose 99th percentile stays within `p99_ms` and that miss no more than one tick in a thousand.

    Bisection between one and the engine's throughput. Raises ValueError when not even one robot can be served so.
    """

    def fits(load: Load) -> bool:
        return load.p99_ms <= p99_ms and load.missed_share <= 0.001

    low, best = 1, simulate(engine, 1, hz, seconds, seed)
    if not fits(best):
        raise ValueError(
            f"p99_ms: expected a bound that one robot at {hz:g} Hz can be held to, got {p99_ms:g}; "
            f"it sees {best.p99_ms} ms"
        )
    high = int(engine.per_s / hz) + 2
    while high - low > 1:
        middle = (low + high) // 2
        load = simulate(engine, middle, hz, seconds, seed)
        low, high, best = (middle, high, load) if fits(load) else (low, middle, best)
    return best


def fleet(engine: Engine, robots: int, share: int, hz: float, seconds: float, seed: int = 0) -> dict[str, Any]:
    """`robots` over as many engines as hold `share` each, assigned at random as a load balancer that hashes addresses
    does: the fullest engine is what the unluckiest robot sees."""
    engines = math.ceil(robots / share)
    counts = np.bincount(np.random.default_rng(seed).integers(0, engines, robots), minlength=engines)
    even = simulate(engine, math.ceil(robots / engines), hz, seconds, seed)
    fullest = simulate(engine, int(counts.max()), hz, seconds, seed)
    return {
        "robots": robots,
        "engines": engines,
        "fullest": int(counts.max()),
        "even_p99_ms": even.p99_ms,
        "fullest_p99_ms": fullest.p99_ms,
        "fullest_missed_share": fullest.missed_share,
    }


def parse_run_ms(text: str) -> dict[int, float]:
    """`1=3.3,8=15.4` -> batch size: seconds. Raises ValueError."""
    try:
        found = {int(size): float(ms) / 1000 for size, ms in (item.split("=") for item in text.split(","))}
    except ValueError as error:
        raise ValueError(
            f"--run-ms: expected SIZE=MILLISECONDS joined by commas, such as 1=3.3,8=15.4, got {text!r}"
        ) from error
    if 1 not in found or min(found.values()) <= 0 or min(found) < 1:
        raise ValueError(f"--run-ms: expected size 1 and times above 0, got {text!r}")
    return found


def measured(result: Mapping[str, Any]) -> Engine:
    """The engine by the closed loops of a run of `benchmarks.fleet`: a run of one takes what the engine was busy for in
    the loop with batch 1, a full one what it was busy for in the other; between them a straight line. The time in which
    it stood still, though robots waited, is the service's own."""
    full, alone = result["saturated"], result["saturated_batch_1"]
    one = alone["engine_busy_share"] / alone["requests_per_s"]
    most = max(full["engine_busy_share"] / full["requests_per_s"] * full["mean_batch"], one)
    slope = (most - one) / max(full["mean_batch"] - 1.0, 1.0)
    run_s = {int(row["batch"]): one + slope * (row["batch"] - 1) for row in result["engine"]}
    return Engine(run_s, overhead_s=max(1.0 - full["engine_busy_share"], 0.0) / full["requests_per_s"], spread=0.1)


def compare(result: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The model of the closed loops of a run beside what its robots saw at their rate, which the model has not seen."""
    at = result["at_rate"]
    return {
        "robots": result["robots"],
        "hz": result["hz"],
        "busy_with_other_work": result["busy"],
        "measured": {
            "requests_per_s": at["requests_per_s"],
            "mean_batch": at["mean_batch"],
            "p50_ms": at["p50_ms"]["median"],
            "p99_ms": at["p99_ms"]["median"],
            "missed_share": at["missed_share"],
        },
        "model": asdict(simulate(measured(result), result["robots"], result["hz"], seconds)),
    }


def _last_line(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text().strip().splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables, and one JSON object as the last line."""
    args = _parser().parse_args(argv)
    if args.check:
        result: dict[str, Any] = {"benchmark": "capacity", "check": compare(_last_line(args.check), args.seconds)}
        seen, model = result["check"]["measured"], result["check"]["model"]
        print("| | measured | model |\n|---|---|---|")
        print("\n".join(f"| {name} | {value} | {model[name]} |" for name, value in seen.items()))
        print(json.dumps(result))
        return 0
    engine = Engine(parse_run_ms(args.run_ms), args.overhead_ms / 1000, args.path_ms / 1000, args.spread)
    if args.measured:
        engine = measured(_last_line(args.measured))
    best = robots_per_engine(engine, args.hz, args.p99_ms, args.seconds, args.seed)
    kept = max(int(best.robots * (1 - args.margin)), 1)
    rows = [fleet(engine, robots, kept, args.hz, args.seconds, args.seed) for robots in args.fleet]
    print(
        f"{best.robots} robots at {args.hz:g} Hz within {args.p99_ms:g} ms (p99); "
        f"{kept} with a margin of {args.margin:.0%}"
    )
    print(
        "\n| robots | engines | on the fullest | p99 ms, even | p99 ms, fullest | missed, fullest |"
        "\n|---|---|---|---|---|---|"
    )
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    print(json.dumps({"benchmark": "capacity", "per_engine": asdict(best), "kept": kept, "fleet": rows}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__)
    parser.add_argument("--run-ms", default="1=2.31,2=3.88,4=7.31,8=14.37", help="milliseconds of a run by batch size")
    parser.add_argument("--overhead-ms", type=float, default=0.6, help="of the service, a request, the engine idle")
    parser.add_argument("--path-ms", type=float, default=1.0, help="of a request, beside the engine's work")
    parser.add_argument("--measured", type=Path, help="output of benchmarks.fleet, instead of these")
    parser.add_argument("--spread", type=float, default=0.1, help="of the logarithm of a run's time")
    parser.add_argument("--hz", type=float, default=2.5, help="requests a second of each robot")
    parser.add_argument("--p99-ms", type=float, default=50.0)
    parser.add_argument("--margin", type=float, default=0.3, help="share of an engine that is kept free")
    parser.add_argument("--fleet", type=int, nargs="*", default=[10, 100, 1000, 10000])
    parser.add_argument("--seconds", type=float, default=20.0, help="simulated, of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path, help="output of benchmarks.fleet to compare the model with")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
