"""The load: reads jobs (one JSON object a line) from standard input and answers each with one JSON line.

`ready` waits until the server gives actions of the right shape; `closed` is one robot that asks again as soon as it is
answered; `open` is robots on a clock of their own, which do not wait for a server that is late.
"""

import asyncio
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from sample import ACTIONS, CHUNK, Sample, load, message
from socket_link import Codec, HttpCodec, LinkError, SocketLink, StreamLink, WebsocketCodec

TIMEOUT_S = 10.0
_SPREAD = 0.6180339887  # robots' phases: the golden ratio spreads any number of them evenly


def main() -> None:
    protocol, port, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        for line in sys.stdin:
            job = json.loads(line)
            robots = Robots(protocol, port, folder, load(Path(job["payload"])))
            gc.collect()
            gc.disable()  # a collection of the client's is not the server's latency
            try:
                answer = runner.run(_JOBS[job["mode"]](robots, job))
            except Exception as error:  # whatever a peer's client raises becomes the row's reason
                answer = {"error": f"{type(error).__name__}: {error}"[:500]}
            gc.enable()
            print(json.dumps(answer), flush=True)


class Robots:
    """Makes the links of one protocol to one server."""

    def __init__(self, protocol: str, port: int, folder: str, sample: Sample) -> None:
        self.protocol, self.port, self._folder, self._sample = protocol, port, folder, sample

    def codec(self) -> Codec:
        data = message(self._sample)
        if self.protocol == "openpi":
            return WebsocketCodec(self.port, data)
        return HttpCodec(self.port, data, "/predict" if self.protocol == "litserve" else "/")

    @property
    def on_sockets(self) -> bool:
        return self.protocol in ("openpi", "ray", "litserve")

    async def link(self, number: int = 0) -> Any:
        """An open link on the event loop."""
        link: Any
        if self.protocol == "lerobot":
            from lerobot_link import LerobotLink

            link = LerobotLink(self._sample, self._folder, number, TIMEOUT_S)
        elif self.protocol == "vlagents":
            from vlagents_link import VlagentsLink

            link = VlagentsLink(self._sample, TIMEOUT_S)
        else:
            link = StreamLink(self.codec(), TIMEOUT_S)
        await link.open(self.port)
        return link


async def ready(robots: Robots, job: dict[str, Any]) -> dict[str, Any]:
    """patience_s: how long to try."""
    limit = time.monotonic() + job["patience_s"]
    while True:
        try:
            shape = await _shape_of_first(robots)
        except Exception:
            if time.monotonic() > limit:
                raise
            await asyncio.sleep(0.1)
            continue
        if shape != [CHUNK, ACTIONS]:
            raise LinkError(f"actions: expected {[CHUNK, ACTIONS]}, got {shape}")
        return {"shape": shape}


async def _shape_of_first(robots: Robots) -> list[int]:
    if robots.on_sockets:
        link = SocketLink(robots.codec(), robots.port, TIMEOUT_S)
        shape = list(link.actions(link.ask()).shape)
        link.close()
        return shape
    other = await robots.link()
    try:
        return list(other.actions(await other.ask()).shape)
    finally:
        await other.close()


async def closed(robots: Robots, job: dict[str, Any]) -> dict[str, Any]:
    """requests: at most so many after `warm_up` that do not count; seconds: for at most so long.
    -> latencies_ms of each, request sent to reply here; asked: all of them."""
    limit, times = time.perf_counter() + job["seconds"], list[float]()
    blocking = SocketLink(robots.codec(), robots.port, TIMEOUT_S) if robots.on_sockets else None
    link = blocking or await robots.link()
    ask = blocking.ask if blocking else getattr(link, "ask_now", None)
    for _ in range(job["warm_up"] + job["requests"]):
        start = time.perf_counter()
        if ask is not None:
            ask()
        else:
            await link.ask()
        now = time.perf_counter()
        times.append(1000 * (now - start))
        if now > limit and len(times) > job["warm_up"]:
            break
    if blocking:
        blocking.close()
    else:
        await link.close()
    return {"latencies_ms": times[job["warm_up"] :], "asked": len(times)}


async def open_loop(robots: Robots, job: dict[str, Any]) -> dict[str, Any]:
    """robots at hz for seconds. -> latencies_ms from the tick (or, when the answer before came after it, from when it
    was due); asked; missed: not answered within one period, or not even asked because the one before was still out;
    lag_ms: how late the load's own timers rang (99 of 100 by less)."""
    period = 1.0 / job["hz"]
    opened = await asyncio.gather(*(robots.link(number) for number in range(job["robots"])), return_exceptions=True)
    links = [link for link in opened if not isinstance(link, BaseException)]  # the others miss all their deadlines
    start = time.perf_counter() + 0.05
    ticks = max(int(job["seconds"] * job["hz"]), 1)
    logs = await asyncio.gather(
        *(_drive(link, start + (number * _SPREAD % 1) * period, period, ticks) for number, link in enumerate(links))
    )
    await asyncio.gather(*(link.close() for link in links), return_exceptions=True)
    times = [value for log in logs for value in log[0]]
    lags = sorted(value for log in logs for value in log[1])
    late = sum(value > 1000 * period for value in times)
    return {
        "latencies_ms": times,
        "asked": ticks * len(opened),
        "missed": ticks * len(opened) - len(times) + late,
        "lag_ms": lags[int(0.99 * (len(lags) - 1))] if lags else 0.0,
    }


async def _drive(link: Any, start: float, period: float, ticks: int) -> tuple[list[float], list[float]]:
    times: list[float] = []
    lags: list[float] = []
    for tick in range(ticks):
        due = start + tick * period
        now = time.perf_counter()
        if now > due + period:
            continue  # still busy with an older one when the next was due: this one was never asked
        if now < due:
            await asyncio.sleep(due - now)
            began = time.perf_counter()  # a timer that rings late is the load's fault, and shown as such
            lags.append(1000 * (began - due))
        else:
            began = due  # the server's: it kept the robot waiting
        try:
            await link.ask()
        except Exception:  # a robot whose request fails has missed it, and goes on
            continue
        times.append(1000 * (time.perf_counter() - began))
    return times, lags


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


_JOBS = {"ready": ready, "closed": closed, "open": open_loop}

if __name__ == "__main__":
    main()
