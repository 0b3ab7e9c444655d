"""`recap-client run | replay | bench | spec`: drive a robot, look into a recording, measure or describe a service."""

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_client import verdict
from recap_client.chunks import STRATEGIES
from recap_client.delay import Delay
from recap_client.emergency import EmergencyStop, EmergencyStopped, armed, file_source, keyboard, signals
from recap_client.fleet import FleetError, FleetSettings, Job, run_fleet
from recap_client.intervention import TakeoverRule
from recap_client.policy import RemotePolicy
from recap_client.record import RecordError
from recap_client.replay import add_replay
from recap_client.robots.base import Observation, RobotError
from recap_client.rollout import RolloutError
from recap_client.runtime import EpisodeResult, LoopSettings
from recap_client.safety import MaxChange
from recap_client.session import ServiceError, served_spec
from recap_client.spec import SpecError
from recap_client.tracing import TracingError

KNOWN_ERRORS = (EmergencyStopped, FleetError, RecordError, RobotError, RolloutError, ServiceError, SpecError,
                TracingError)  # fmt: skip

_VERDICTS = "s = success, f = failure, d = discard (its recording is set aside)"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0, 1 when a recording is not whole, 2 for a known error, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(arguments.command(arguments))
    except KNOWN_ERRORS as error:
        print(f"recap-client: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("recap-client: stopped; what was recorded is kept", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Run episodes, one line each, and a JSON summary as the last line."""
    rule = TakeoverRule(arguments.intervene) if arguments.intervene else None
    late = _delay(arguments.delay_ms, arguments.jitter_ms, arguments.realtime)
    loop = LoopSettings(
        arguments.execute, arguments.realtime, max_change=_max_change(arguments.max_change),
        image_format=arguments.images, chunks=arguments.chunks, horizon=arguments.horizon, delay=late,
    )  # fmt: skip
    settings = FleetSettings(arguments.robot, json.loads(arguments.robot_options), arguments.url, arguments.value_url,
                             arguments.style, rule, arguments.record, loop, _headers(arguments.api_key),
                             tls_ca=arguments.tls_ca, proxy=arguments.proxy)  # fmt: skip
    jobs = [Job(task, arguments.seed + n) for n in range(arguments.episodes) for task in arguments.task]
    with _emergency_stop(arguments.stop_file) as stop:
        results = run_fleet(jobs, settings, on_result=lambda result, resumed: _told(stop, result, resumed))
    latency = np.concatenate([result.act_latency_s for result in results]) if results else np.zeros(0)
    kept = [bool(result.success) for result in results if result.reason != "discarded"]
    print(json.dumps({
        "episodes": len(kept), "success_rate": float(np.mean(kept)) if kept else None,
        "discarded": len(results) - len(kept),
        "steps": sum(result.steps for result in results), **_percentiles("act", latency),
        "deadline_misses": sum(result.missed_deadlines for result in results),
        "chunks": arguments.chunks, **_switches(results),
    }))  # fmt: skip
    return 1 if any(result.record_error for result in results) else 0


def bench(arguments: argparse.Namespace) -> int:
    """Latency of a policy service as the robot sees it; JSON as the last line."""
    headers, tls_ca, proxy = _headers(arguments.api_key), arguments.tls_ca, arguments.proxy
    spec = served_spec(arguments.url, headers, proxy=proxy, tls_ca=tls_ca)
    policy = RemotePolicy(arguments.url, spec, robot="bench", jpeg_quality=arguments.jpeg, headers=headers, proxy=proxy,
                          tls_ca=tls_ca)  # fmt: skip
    rng = np.random.default_rng(0)
    images = {c.name: rng.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8) for c in spec.cameras}
    prompt = spec.tasks[0] if spec.tasks else "bench"
    policy.reset("bench", prompt, 0)
    latency, infer = [], []
    for number in range(arguments.requests + 10):
        observation = Observation(images, np.zeros(len(spec.state), np.float32), time.monotonic())
        chunk = policy.infer(observation, prompt)
        if number >= 10:  # the first ones warm everything up
            latency.append(chunk.latency_s)
            infer.append(chunk.timing.get("infer_ms", float("nan")) / 1e3)
    policy.close()
    print(f"{arguments.url}: {policy.identity.get('name')}, {arguments.requests} requests, one at a time")
    print(json.dumps({"requests": arguments.requests, "chunk": len(chunk.actions), "jpeg": arguments.jpeg,
                      **_percentiles("act", np.array(latency)), **_percentiles("infer", np.array(infer))}))  # fmt: skip
    return 0


def spec(arguments: argparse.Namespace) -> int:
    """Print the robot spec of a service as JSON: names, units, limits, cameras, rate."""
    served = served_spec(arguments.url, _headers(arguments.api_key), proxy=arguments.proxy, tls_ca=arguments.tls_ca)
    print(json.dumps(served.to_json(), indent=1))
    return 0


@contextlib.contextmanager
def _emergency_stop(path: Path | None) -> Iterator[EmergencyStop]:
    """Armed, and pressed by a key, by SIGUSR1 or by a file."""
    stop = EmergencyStop(file_source(path) if path else None)
    with armed(stop), signals(stop), keyboard(stop, _judge) as keys:
        ways = ["Space or Enter"] if keys else []
        ways += [f"kill -USR1 {os.getpid()}"] if sys.platform != "win32" else []
        ways += [f"the file {path}"] if path else []
        print(f"emergency stop: {', '.join(ways)}", file=sys.stderr)
        if keys:
            print(f"end the episode: {_VERDICTS}", file=sys.stderr)
        yield stop


def _judge(key: str) -> None:
    reason = verdict.KEYS.get(key.lower())
    if reason is not None:
        verdict.say(reason)


def _told(stop: EmergencyStop, result: EpisodeResult, resumed: bool) -> None:
    """Show a result; after an emergency stop nothing goes on before the operator says so."""
    _print_result(result, resumed)
    if stop.poll():
        print(f"STOPPED ({stop.poll()}). To go on: r, or kill -USR2 {os.getpid()}. To end: Ctrl-C.", file=sys.stderr)
        stop.wait_until_reset()


def _max_change(values: Sequence[str] | None) -> MaxChange | None:
    """What `SafetyLimits` takes, from one number or from NAME=NUMBER each."""
    if not values:
        return None
    try:
        if len(values) == 1 and "=" not in values[0]:
            return float(values[0])
        return {name: float(number) for name, _, number in (value.rpartition("=") for value in values)}
    except ValueError as error:
        raise SpecError(f"--max-change: expected one number, or NAME=NUMBER each, got {list(values)}") from error


def _percentiles(name: str, seconds: "np.ndarray[Any, Any]") -> dict[str, float | None]:
    if not len(seconds):
        return {f"{name}_p50_ms": None, f"{name}_p99_ms": None}
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {f"{name}_p50_ms": round(float(p50), 3), f"{name}_p99_ms": round(float(p99), 3)}


def _switches(results: Sequence[EpisodeResult]) -> dict[str, float | None]:
    """How chunks followed each other: control steps from observation to first action, and the jump at the seam."""
    delays = [delay for result in results for delay in result.delays]
    seams = [seam for result in results for seam in result.seams]
    return {
        "delay_steps_mean": round(float(np.mean(delays)), 3) if delays else None,
        "delay_steps_max": max(delays, default=None),
        "seam_error_mean": round(float(np.mean(seams)), 5) if seams else None,
        "seam_error_max": round(max(seams), 5) if seams else None,
    }


def _delay(delay_ms: float, jitter_ms: float, realtime: bool) -> Delay | None:
    if not delay_ms and not jitter_ms:
        return None
    if realtime:
        raise FleetError("--delay-ms, --jitter-ms: expected --fast with them (robot time), got real time")
    try:
        return Delay(delay_ms / 1e3, jitter_ms / 1e3)
    except ValueError as error:
        raise FleetError(f"--delay-ms, --jitter-ms: {error}") from error


def _print_result(result: EpisodeResult, resumed: bool) -> None:
    outcome = {True: "success", False: "failed ", None: "stopped"}[result.success]
    if result.reason == "discarded":
        outcome = "discarded, the same command asks for it again,"
    notes = [f"{result.missed_deadlines} deadlines missed"] if result.missed_deadlines else []
    notes += [f"operator {result.intervened} steps"] if result.intervened else []
    notes += ["already recorded"] if resumed else []
    notes += [result.record_error] if result.record_error else []
    head = f"{result.task_name} seed {result.seed}: {outcome} after {result.steps} steps"
    print(f"{head}  {'; '.join(notes)}", flush=True)


def _headers(api_key: str | None) -> dict[str, str]:
    key = api_key or os.environ.get("RECAP_API_KEY")
    return {"Authorization": f"Api-Key {key}"} if key else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("recap-client", description="Robot side of the RECAP stack.")
    commands = parser.add_subparsers(required=True, metavar="run|replay|bench|spec")
    add = commands.add_parser("run", help="run episodes on a robot against a policy service, and record them",
                              epilog=f"Keys while an episode runs: Space or Enter = stop, {_VERDICTS}.")  # fmt: skip
    add.add_argument("--robot", default="metaworld", help="name, lerobot:TYPE, or package.module:Class")
    add.add_argument("--robot-options", default="{}", metavar="JSON", help="keyword arguments of the robot")
    add.add_argument("--task", nargs="+", required=True, help="task names or prompts of the robot")
    add.add_argument("--url", help="policy service, e.g. ws://127.0.0.1:8000/act; without it the human demonstrates")
    add.add_argument("--value-url", help="critic service, e.g. ws://127.0.0.1:8001/value")
    add.add_argument("--intervene", type=float, default=0.0, metavar="P", help="probability that an operator watches")
    add.add_argument("--style", default="mixed", help="of demonstrations (simulated arm: mixed, clean, slow, ...)")
    add.add_argument("--episodes", type=int, default=1, help="per task")
    add.add_argument("--seed", type=int, default=0, help="of the first episode")
    add.add_argument("--record", type=Path, metavar="DIR", help="one .mcap per episode; finished ones are skipped")
    add.add_argument("--images", choices=("png", "jpeg"), default="png", help="in the recording; png is lossless")
    add.add_argument("--execute", type=int, default=4, help="actions of a chunk before asking again")
    add.add_argument("--chunks", choices=STRATEGIES, default="switch",
                     help="how one chunk follows another: the newest at once; the same, asking whenever possible; the "
                     "mean of those that overlap; real-time chunking (model exported with --rtc)")  # fmt: skip
    add.add_argument("--horizon", type=int, metavar="N", help="rtc: rows of the old chunk to keep (default: the delay)")
    add.add_argument("--delay-ms", type=float, default=0.0, help="with --fast: delay of replies, in robot time")
    add.add_argument("--jitter-ms", type=float, default=0.0, help="with --fast: of that delay, plus or minus")
    add.add_argument("--max-change", nargs="+", metavar="[NAME=]X",
                     help="largest change per control step: of every action dimension, or of those named")  # fmt: skip
    add.add_argument("--stop-file", type=Path, metavar="PATH", help="emergency stop while this file exists")
    add.add_argument("--api-key", help="default: RECAP_API_KEY of the environment, which others cannot see")
    add.add_argument("--tls-ca", type=Path, metavar="FILE", help="CA of services at wss:// (else the system's)")
    add.add_argument("--proxy", metavar="URL", help="HTTP proxy to the services; those of the environment are ignored")
    pace = add.add_mutually_exclusive_group()
    pace.add_argument("--realtime", dest="realtime", action="store_true", default=True, help="control rate (default)")
    pace.add_argument("--fast", dest="realtime", action="store_false", help="as fast as the simulator goes")
    add.set_defaults(command=run)
    add_replay(commands)
    add = commands.add_parser("bench", help="latency of a policy service")
    add.add_argument("--url", required=True)
    add.add_argument("--requests", type=int, default=200)
    add.add_argument("--jpeg", type=int, metavar="QUALITY", help="send JPEG instead of raw frames")
    add.add_argument("--api-key", help="default: RECAP_API_KEY of the environment, which others cannot see")
    add.add_argument("--tls-ca", type=Path, metavar="FILE", help="CA of services at wss:// (else the system's)")
    add.add_argument("--proxy", metavar="URL", help="HTTP proxy to the service")
    add.set_defaults(command=bench)
    add = commands.add_parser("spec", help="the robot that a service was made for, as JSON")
    add.add_argument("--url", required=True)
    add.add_argument("--api-key", help="default: RECAP_API_KEY of the environment, which others cannot see")
    add.add_argument("--tls-ca", type=Path, metavar="FILE", help="CA of services at wss:// (else the system's)")
    add.add_argument("--proxy", metavar="URL", help="HTTP proxy to the service")
    add.set_defaults(command=spec)
    return parser


if __name__ == "__main__":
    sys.exit(main())
