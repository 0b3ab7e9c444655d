"""The order of the measurements, and their rows."""

import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve.options import ServeBenchArgs
from benchmarks.serve.payloads import PAYLOADS, Payload
from benchmarks.serve.search import most
from benchmarks.serve.servers import Block, Probe, Served, Server, Unmeasured, serving
from benchmarks.serve.standalone.sample import save

Row = dict[str, Any]

MISSES = 0.01
_DEADLINES = 100  # fewer say nothing about one in a hundred
_HOPELESS = 0.05  # share of misses at which a second try is a waste
_ADDED = "2x224"
_BLOCKS = 10


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bench:
    """Runs servers one after the other in a folder of its own."""

    def __init__(self, args: ServeBenchArgs, folder: Path) -> None:
        self._args, self._folder = args, folder
        self._files: dict[str, Path] = {}
        for name in {*args.payloads, _ADDED}:
            self._files[name] = folder / f"{name}.npz"
            save(PAYLOADS[name].sample(), self._files[name])

    def rows(self, servers: list[Server]) -> Iterator[Row]:
        """Latency of every server on every payload, in turns (ABAB, payload by payload); in the last turn also how
        many robots it holds."""
        args = self._args
        for payload in (PAYLOADS[name] for name in args.payloads):
            blocks: dict[str, list[Block]] = {server.name: [] for server in servers}
            held: dict[str, list[Row]] = {}
            failed = {server.name: why for server in servers if (why := server.cannot(payload))}
            for turn in range(args.rounds):
                for server in servers:
                    if server.name in failed:
                        continue
                    say(f"{payload.name}, round {turn + 1} of {args.rounds}: {server.name}")
                    try:
                        with self._serving(server, payload) as served:
                            block = served.closed(args.requests, args.warm_up, args.block_s)
                            blocks[server.name].append(block)
                            _tell(block.latencies_ms, block.cpu_s)
                            if turn == args.rounds - 1:
                                typical = float(np.median(block.latencies_ms))
                                held[server.name] = self._robots(served, server, payload, typical)
                    except Unmeasured as error:
                        say(f"  not measured: {error}")
                        failed[server.name] = str(error)
            for server in servers:
                if server.name in failed:
                    yield unmeasured(server.name, payload.name, failed[server.name])
                else:
                    yield _closed_row(server.name, payload.name, blocks[server.name])
                    yield from held[server.name]

    def added(self, ours: Server, echo: Server) -> Row:
        """What the service adds to a model that takes no time, beside the echo server: both up, short blocks in
        turns, so that whatever else the machine does meets both."""
        payload = PAYLOADS[_ADDED]
        say(f"{_ADDED}: time added to the model, {ours.name} and {echo.name} in turns")
        blocks = 2 if self._args.quick else _BLOCKS
        requests = max(self._args.requests * self._args.rounds // blocks, 10)
        times: dict[str, list[float]] = {ours.name: [], echo.name: []}
        with self._serving(echo, payload) as first, self._serving(ours, payload) as second:
            for _ in range(blocks):
                for server, served in ((echo, first), (ours, second)):
                    times[server.name] += served.closed(requests, 10, self._args.block_s).latencies_ms
        mine, floor = _percentiles(times[ours.name]), _percentiles(times[echo.name])
        return {
            "payload": _ADDED,
            "requests": len(times[ours.name]),
            **mine,
            **{f"echo_{name}": value for name, value in floor.items()},
            "ratio_p50": round(mine["p50_ms"] / floor["p50_ms"], 3),
            "ratio_p99": round(mine["p99_ms"] / floor["p99_ms"], 3),
        }

    def _robots(self, served: Served, server: Server, payload: Payload, typical_ms: float) -> list[Row]:
        """One row a rate: the most robots of which 99 of 100 deadlines are met (0: not even one)."""
        rows = []
        for hz in sorted(self._args.rates, reverse=True):
            best: dict[int, Probe] = {}

            def holds(count: int, hz: int = hz, best: dict[int, Probe] = best) -> bool:
                probe = self._probe(served, count, hz)
                if probe.missed <= MISSES * probe.asked or count == 1:
                    best[count] = probe
                return probe.missed <= MISSES * probe.asked

            guess = 1 << max(int(math.log2(max(500 / (hz * typical_ms), 1))), 0)
            count = most(holds, start=guess, limit=self._args.most_robots)
            probe = best[max(count, 1)]
            say(f"  {count} robots at {hz} Hz")
            rows.append(
                {
                    "server": server.name,
                    "payload": payload.name,
                    "robots": count,
                    "hz": hz,
                    **_percentiles(probe.latencies_ms),
                    "cpu_s_per_request": round(probe.cpu_s, 7),
                    "misses": round(probe.missed / probe.asked, 5),
                    "load_lag_ms": round(probe.lag_ms, 2),
                }
            )
        return rows

    def _probe(self, served: Served, count: int, hz: int) -> Probe:
        seconds = max(self._args.probe_s, _DEADLINES / (count * hz))
        probe = served.open_loop(count, hz, seconds)
        if MISSES * probe.asked < probe.missed <= _HOPELESS * probe.asked:
            again = served.open_loop(count, hz, seconds)  # a hiccup of the machine is not the server's
            probe = min(probe, again, key=lambda tried: tried.missed)
        return probe

    @contextmanager
    def _serving(self, server: Server, payload: Payload) -> Iterator[Served]:
        with (
            tempfile.TemporaryDirectory(dir=self._folder, prefix="s", ignore_cleanup_errors=True) as folder,
            serving(server, payload, self._files[payload.name], Path(folder)) as served,
        ):
            yield served


def unmeasured(server: str, payload: str, why: str) -> Row:
    """A row that says why it is none."""
    empty = dict.fromkeys(("robots", "hz", "p50_ms", "p95_ms", "p99_ms", "cpu_s_per_request", "misses"))
    return {"server": server, "payload": payload, **empty, "not_measured": why}


def _closed_row(server: str, payload: str, blocks: list[Block]) -> Row:
    """All rounds pooled. hz None: as fast as it is answered; there are no deadlines to miss."""
    times = [value for block in blocks for value in block.latencies_ms]
    return {
        "server": server,
        "payload": payload,
        "robots": 1,
        "hz": None,
        **_percentiles(times),
        "cpu_s_per_request": round(float(np.median([block.cpu_s for block in blocks])), 7),
        "misses": None,
    }


def _percentiles(times: list[float]) -> dict[str, float]:
    values = np.percentile(times, [50, 95, 99]) if times else [float("nan")] * 3
    return {f"p{q}_ms": round(float(value), 4) for q, value in zip((50, 95, 99), values, strict=True)}


def _tell(times: list[float], cpu_s: float) -> None:
    p50, _, p99 = _percentiles(times).values()
    say(f"  p50 {p50:.3f} ms, p99 {p99:.3f} ms, CPU {1000 * cpu_s:.3f} ms a request, {len(times)} requests")
