"""`recap-client run | replay | bench`: drive a robot, look into a recording, measure a service."""

import argparse
import contextlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_client.fleet import FleetError, FleetSettings, Job, run_fleet
from recap_client.intervention import TakeoverRule
from recap_client.pace import Pace
from recap_client.policy import RemotePolicy
from recap_client.record import RecordError
from recap_client.robots.base import Observation, RobotError
from recap_client.robots.registry import open_robot
from recap_client.rollout import RolloutError, read_rollout
from recap_client.runtime import EpisodeResult, LoopSettings
from recap_client.safety import SafetyLimits
from recap_client.session import ServiceError
from recap_client.spec import RobotSpec, SpecError, require_equal

KNOWN_ERRORS = (FleetError, RecordError, RobotError, RolloutError, ServiceError, SpecError)


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
    loop = LoopSettings(
        arguments.execute, arguments.realtime, max_change=arguments.max_change, image_format=arguments.images
    )
    settings = FleetSettings(arguments.robot, json.loads(arguments.robot_options), arguments.url, arguments.value_url,
                             arguments.style, rule, arguments.record, loop, _headers(arguments.api_key))  # fmt: skip
    jobs = [Job(task, arguments.seed + n) for n in range(arguments.episodes) for task in arguments.task]
    results = run_fleet(jobs, settings, on_result=_print_result)
    latency = np.concatenate([result.act_latency_s for result in results]) if results else np.zeros(0)
    print(json.dumps({
        "episodes": len(results), "success_rate": float(np.mean([bool(result.success) for result in results])),
        "steps": sum(result.steps for result in results), **_percentiles("act", latency),
        "deadline_misses": sum(result.missed_deadlines for result in results),
    }))  # fmt: skip
    return 1 if any(result.record_error for result in results) else 0


def replay(arguments: argparse.Namespace) -> int:
    """Print what a recording holds, or step its actions through a robot from the same task and seed."""
    rollout = read_rollout(arguments.file, images=False)
    outcome = {True: "success", False: "no success", None: "outcome unknown"}[rollout.success]
    print(f"{rollout.task!r} ({rollout.spec.robot}, seed {rollout.seed}): {rollout.steps} steps at "
          f"{rollout.control_hz:g} Hz, {outcome} ({rollout.reason})")  # fmt: skip
    by = f"demonstration, style {rollout.style}" if rollout.demonstration else f"policy {dict(rollout.policy or {})}"
    print(
        f"{by}; {int(rollout.intervention.sum())} steps under the operator; {rollout.missed_deadlines} missed "
        f"deadlines; cameras {', '.join(rollout.spec.camera_names)}{'' if rollout.complete else '; FILE INCOMPLETE'}"
    )
    if arguments.robot is None:
        return 0
    step, worst, success = -1, 0.0, None
    robot = open_robot(arguments.robot)
    try:
        require_equal(robot.spec, rollout.spec, what=f"{arguments.file}: recorded on another robot")
        safe = SafetyLimits(robot.spec)
        robot.reset(rollout.task, rollout.seed)
        pace = Pace(1.0 / rollout.control_hz, realtime=not arguments.fast)
        for step, action in enumerate(rollout.action):
            pace.wait(step)
            worst = max(worst, float(np.abs(robot.observe().state - rollout.state[step]).max()))
            result = robot.act(safe(action)) if np.isfinite(action).all() else robot.hold()
            pace.end(step)
            success = result.success
            if result.done:
                break
    except BaseException:
        with contextlib.suppress(Exception):
            robot.hold()
        raise
    finally:
        robot.close()
    print(json.dumps({"steps": step + 1, "success": success, "recorded_success": rollout.success,
                      "largest_state_difference": worst}))  # fmt: skip
    return 0


def bench(arguments: argparse.Namespace) -> int:
    """Latency of a policy service as the robot sees it; JSON as the last line."""
    spec = _served_spec(arguments.url, _headers(arguments.api_key))
    policy = RemotePolicy(arguments.url, spec, robot="bench", jpeg_quality=arguments.jpeg,
                          headers=_headers(arguments.api_key))  # fmt: skip
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


def _served_spec(url: str, headers: dict[str, str]) -> RobotSpec:
    """The robot spec that a policy service was made for: a benchmark has no robot of its own."""
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    from recap_client.session import SUBPROTOCOL
    from recap_client.wire import unpack

    try:
        with connect(url, subprotocols=[SUBPROTOCOL], compression=None, proxy=None,  # type: ignore[list-item]
                     additional_headers=headers) as link:  # fmt: skip
            welcome = unpack(link.recv(timeout=5))
            return RobotSpec.from_json(welcome["spec"]["robot"])
    except (OSError, WebSocketException, KeyError, TypeError, ValueError) as error:
        raise ServiceError(f"{url}: expected a policy service speaking {SUBPROTOCOL}, got none: {error}") from error


def _percentiles(name: str, seconds: "np.ndarray[Any, Any]") -> dict[str, float | None]:
    if not len(seconds):
        return {f"{name}_p50_ms": None, f"{name}_p99_ms": None}
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {f"{name}_p50_ms": round(float(p50), 3), f"{name}_p99_ms": round(float(p99), 3)}


def _print_result(result: EpisodeResult, resumed: bool) -> None:
    outcome = {True: "success", False: "failed ", None: "stopped"}[result.success]
    notes = [f"{result.missed_deadlines} deadlines missed"] if result.missed_deadlines else []
    notes += [f"operator {result.intervened} steps"] if result.intervened else []
    notes += ["already recorded"] if resumed else []
    notes += [result.record_error] if result.record_error else []
    head = f"{result.task_name} seed {result.seed}: {outcome} after {result.steps} steps"
    print(f"{head}  {'; '.join(notes)}", flush=True)


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Api-Key {api_key}"} if api_key else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("recap-client", description="Robot side of the RECAP stack.")
    commands = parser.add_subparsers(required=True, metavar="run|replay|bench")
    add = commands.add_parser("run", help="run episodes on a robot against a policy service, and record them")
    add.add_argument("--robot", default="metaworld", help="name, or package.module:Class")
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
    add.add_argument("--max-change", type=float, help="largest change of an action dimension per control step")
    add.add_argument("--api-key")
    pace = add.add_mutually_exclusive_group()
    pace.add_argument("--realtime", dest="realtime", action="store_true", default=True, help="control rate (default)")
    pace.add_argument("--fast", dest="realtime", action="store_false", help="as fast as the simulator goes")
    add.set_defaults(command=run)
    add = commands.add_parser("replay", help="summary of a recording, or its actions on a robot")
    add.add_argument("file", type=Path)
    add.add_argument("--robot", help="step the actions through this robot")
    add.add_argument("--fast", action="store_true", help="as fast as the robot goes, not at the recorded rate")
    add.set_defaults(command=replay)
    add = commands.add_parser("bench", help="latency of a policy service")
    add.add_argument("--url", required=True)
    add.add_argument("--requests", type=int, default=200)
    add.add_argument("--jpeg", type=int, metavar="QUALITY", help="send JPEG instead of raw frames")
    add.add_argument("--api-key")
    add.set_defaults(command=bench)
    return parser


if __name__ == "__main__":
    sys.exit(main())
