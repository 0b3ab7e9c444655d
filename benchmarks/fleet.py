"""Many robots on one engine: `python -m benchmarks.fleet --models assets/model_repository`.

The real service in a process of its own, N robots on real websockets in this one. First the bare engine per batch size;
then the robots at their rate, phases spread by a seeded generator; then all of them asking again as soon as they are
answered, with batching and with the engine limited to batch 1. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.serve import machine
from recap_client import wire
from recap_client.spec import RobotSpec
from recap_model.spec import spec_from_json
from services.common.channel import SUBPROTOCOL
from services.common.onnxruntime_engine import OnnxRuntimeEngine
from services.common.repository import open_model

_WARM_UP_S = 1.0
_STARTING_S = 120.0


@dataclass(frozen=True)
class Service:
    """A running policy service."""

    port: int
    pid: int

    def counters(self) -> dict[str, float]:
        """Samples without labels, by name, and the CPU seconds of the process."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as reply:
            families = text_string_to_metric_families(reply.read().decode())
        found = {s.name: s.value for family in families for s in family.samples if not s.labels}
        return found | {"cpu_s": _cpu_seconds(self.pid), "at": time.perf_counter()}


@dataclass
class Trips:
    """One robot: seconds of its round trips, and ticks at which it had no answer to the one before."""

    seconds: list[float] = field(default_factory=list)
    missed: int = 0
    failed: int = 0


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, and one JSON object as the last line."""
    args = _parser().parse_args(argv)
    busy = machine.busy()
    engine = bare_engine(args.models, args.repeats)
    with serving(args.models, None) as service:
        paced = asyncio.run(at_rate(service, args.robots, args.hz, args.seconds, args.seed))
        batched = asyncio.run(saturated(service, args.robots, args.saturate))
    with serving(args.models, (1,)) as service:
        alone = asyncio.run(saturated(service, args.robots, args.saturate))
    ratio = batched["requests_per_s"] / alone["requests_per_s"]
    result = {
        "benchmark": "fleet",
        "hardware": machine.hardware(),
        "busy": round(busy, 3),
        "robots": args.robots,
        "hz": args.hz,
        "engine": engine,
        "at_rate": paced,
        "saturated": batched,
        "saturated_batch_1": alone,
        "throughput_ratio": round(ratio, 3),
        "engine_ratio": engine[-1]["times_batch_1"],
    }
    print(_report(result))
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="model repository with a policy")
    parser.add_argument("--robots", type=int, default=32)
    parser.add_argument("--hz", type=float, default=10.0, help="requests a second of each robot")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the part at that rate")
    parser.add_argument("--saturate", type=float, default=8.0, help="seconds of each of the two closed loops")
    parser.add_argument("--repeats", type=int, default=100, help="calls of the bare engine a batch size")
    parser.add_argument("--seed", type=int, default=0, help="of phases and observations")
    return parser


def bare_engine(models: Path, repeats: int) -> list[dict[str, Any]]:
    """Every batch size alone: wall and CPU milliseconds a run, chunks a second, and how many times those of batch 1."""
    engine = OnnxRuntimeEngine(open_model(models, "policy"))
    engine.warm_up()
    rows: list[dict[str, Any]] = []
    for size in engine.batch_sizes:
        inputs = _inputs(engine, size)
        wall, cpu = np.array([_timed(partial(engine.run, inputs)) for _ in range(repeats)]).T
        per_s = size / np.median(cpu)  # CPU seconds: what else runs on the machine does not count
        times = per_s / rows[0]["chunks_per_cpu_s"] if rows else 1.0
        rows.append(
            {
                "batch": size,
                "wall_p50_ms": _ms(wall, 50),
                "cpu_p50_ms": _ms(cpu, 50),
                "chunks_per_cpu_s": round(float(per_s), 1),
                "times_batch_1": round(float(times), 3),
            }
        )
    engine.close()
    return rows


def _inputs(engine: OnnxRuntimeEngine, size: int) -> dict[str, NDArray[Any]]:
    dtypes = {"images": np.uint8, "tokens": np.int32, "token_mask": np.bool_}
    return {name: np.ones((size, *shape), dtypes.get(name, np.float32)) for name, shape in engine.input_shapes.items()}


@contextmanager
def serving(models: Path, sizes: tuple[int, ...] | None) -> Iterator[Service]:
    """The policy service in a process of its own, with the engine's batch sizes or these."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(models, sizes, there), name="policy", daemon=True)
    child.start()
    there.close()
    try:
        if not here.poll(_STARTING_S):
            raise SystemExit(f"the service did not start within {_STARTING_S:.0f} s; its own message is above")
        yield Service(here.recv(), child.pid or 0)
    finally:
        child.terminate()
        child.join(10)


def _serve(models: Path, sizes: tuple[int, ...] | None, ready: Connection) -> None:
    from services.common.logs import configure
    from services.common.server import bind, make_server
    from services.common.settings import PolicySettings
    from services.policy.app import create_app

    configure("json")
    engine = OnnxRuntimeEngine(open_model(models, "policy"), sizes)
    engine.warm_up()
    app = create_app(engine, PolicySettings(seed=0))
    sock = bind("127.0.0.1", 0)
    server = make_server(app, app.state.limits)

    async def run() -> None:
        task = asyncio.ensure_future(server.serve(sockets=[sock]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        ready.send(sock.getsockname()[1])
        await task

    asyncio.run(run(), loop_factory=server.config.get_loop_factory())


async def at_rate(service: Service, robots: int, hz: float, seconds: float, seed: int) -> dict[str, Any]:
    """Every robot asks at `hz`; a robot that still waits at its next tick misses that tick."""
    phases = np.random.default_rng(seed).uniform(0.0, 1.0 / hz, robots)

    async def robot(client: ClientConnection, message: bytes, trips: Trips, number: int, start: float) -> None:
        due = start + phases[number]
        while due < start + seconds:
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            await _ask(client, message, trips)
            passed = max(0, int((time.perf_counter() - due) * hz))
            trips.missed += passed
            due += (1 + passed) / hz

    trips, used = await _fleet(service, robots, seed, robot)
    p50, p99 = ([_ms(np.array(each.seconds), q) for each in trips] for q in (50, 99))
    missed, asked = sum(each.missed for each in trips), sum(len(each.seconds) for each in trips)
    return {
        "p50_ms": _spread(p50),
        "p99_ms": _spread(p99),
        "worst_over_median_p99": round(max(p99) / float(np.median(p99)), 3),
        "missed_ticks": missed,
        "missed_share": round(missed / (asked + missed), 5),
        **used,
    }


async def saturated(service: Service, robots: int, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Every robot asks again as soon as it is answered."""

    async def robot(client: ClientConnection, message: bytes, trips: Trips, _: int, start: float) -> None:
        while time.perf_counter() < start + seconds:
            await _ask(client, message, trips)

    trips, used = await _fleet(service, robots, seed, robot)
    served = [len(each.seconds) for each in trips]
    return used | {"least_over_median_served": round(min(served) / float(np.median(served)), 3)}


Robot = Callable[[ClientConnection, bytes, Trips, int, float], Coroutine[Any, Any, None]]


async def _fleet(service: Service, robots: int, seed: int, robot: Robot) -> tuple[list[Trips], dict[str, Any]]:
    url = f"ws://127.0.0.1:{service.port}/act"
    options: dict[str, Any] = {"subprotocols": [SUBPROTOCOL], "compression": None, "max_size": None, "proxy": None}
    clients = [await connect(url, **options) for _ in range(robots)]
    try:
        welcome = [wire.unpack(await client.recv()) for client in clients]
        spec = spec_from_json(welcome[0]["spec"]).robot
        messages = [_message(spec, np.random.default_rng([seed, i])) for i in range(robots)]
        until = time.perf_counter() + _WARM_UP_S
        await asyncio.gather(*(_warm_up(c, m, until) for c, m in zip(clients, messages, strict=True)))
        trips = [Trips() for _ in clients]
        before = await asyncio.to_thread(service.counters)
        start = time.perf_counter()
        await asyncio.gather(*(robot(c, messages[i], trips[i], i, start) for i, c in enumerate(clients)))
        after = await asyncio.to_thread(service.counters)
    finally:
        await asyncio.gather(*(client.close() for client in clients))
    return trips, _used(trips, before, after)


async def _warm_up(client: ClientConnection, message: bytes, until: float) -> None:
    while time.perf_counter() < until:
        await _ask(client, message, Trips())


async def _ask(client: ClientConnection, message: bytes, trips: Trips) -> None:
    start = time.perf_counter()
    await client.send(message)
    reply = await client.recv()
    trips.seconds.append(time.perf_counter() - start)
    if wire.unpack(reply)["type"] != "chunk":
        trips.failed += 1


def _message(robot: RobotSpec, generator: np.random.Generator) -> bytes:
    images = {c.name: generator.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8) for c in robot.cameras}
    state = generator.uniform(-0.5, 0.5, len(robot.state)).astype(np.float32)
    prompt = robot.tasks[0] if robot.tasks else "do the task"
    return wire.pack({"type": "act", "seq": 0, "observation": {"images": images, "state": state, "prompt": prompt}})


def _used(trips: Sequence[Trips], before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    d = {name: after[name] - before.get(name, 0.0) for name in after}
    requests, runs = d["recap_act_batch_size_sum"], max(d["recap_act_batch_size_count"], 1.0)
    return {
        "requests_per_s": round(requests / d["at"], 1),
        "mean_batch": round(requests / runs, 3),
        "engine_busy_share": round(d["recap_engine_busy_seconds_total"] / d["at"], 3),
        "service_cpu_ms_per_request": round(1000 * d["cpu_s"] / max(requests, 1.0), 3),
        "failed": sum(each.failed for each in trips),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"best": min(values), "median": round(float(np.median(values)), 3), "worst": max(values)}


def _ms(seconds: NDArray[np.float64], q: float) -> float:
    return round(1000 * float(np.percentile(seconds, q)), 3)


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.thread_time()
    call()
    return time.perf_counter() - wall, time.thread_time() - cpu


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _report(result: dict[str, Any]) -> str:
    at, full, alone = result["at_rate"], result["saturated"], result["saturated_batch_1"]
    lines = [
        f"{result['hardware']}, {result['busy']:.0%} busy with other work before the run",
        "",
        "| bare engine, batch | wall p50 ms | CPU p50 ms | times batch 1 |",
        "|---|---|---|---|",
        *(
            f"| {r['batch']} | {r['wall_p50_ms']} | {r['cpu_p50_ms']} | {r['times_batch_1']} |"
            for r in result["engine"]
        ),
        "",
        f"| {result['robots']} robots at {result['hz']:g} Hz | best robot | median | worst | worst / median |",
        "|---|---|---|---|---|",
        "| p50 ms | {best} | {median} | {worst} | |".format(**at["p50_ms"]),
        "| p99 ms | {best} | {median} | {worst} | ".format(**at["p99_ms"]) + f"{at['worst_over_median_p99']} |",
        "",
        "| | requests/s | mean batch | engine busy | service CPU ms a request | missed ticks | failed |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {r['requests_per_s']} | {r['mean_batch']} | {r['engine_busy_share']:.0%} "
            f"| {r['service_cpu_ms_per_request']} | {r.get('missed_ticks', '')} | {r['failed']} |"
            for name, r in (("at their rate", at), ("as fast as answered", full), ("the same, batch 1", alone))
        ),
        "",
        f"throughput with batching over batch 1: {result['throughput_ratio']} (bare engine: {result['engine_ratio']})",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
