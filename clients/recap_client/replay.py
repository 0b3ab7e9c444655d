"""`recap-client replay`: look into a recording, step its actions through a robot, or ask a service everything again."""

import argparse
import contextlib
import json
import os
from pathlib import Path

import numpy as np

from recap_client.pace import Pace
from recap_client.resend import resend
from recap_client.robots.registry import open_robot
from recap_client.rollout import Rollout, RolloutError, read_rollout
from recap_client.safety import SafetyLimits
from recap_client.spec import require_equal

TOLERANCE = 1e-4
"""Of an action, in its own unit: room for the arithmetic of another batch size."""


def add_replay(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    add = commands.add_parser("replay", help="summary of a recording, its actions on a robot, or its requests again")
    add.add_argument("file", type=Path)
    add.add_argument("--robot", help="step the actions through this robot")
    add.add_argument("--robot-options", default="{}", metavar="JSON", help="keyword arguments of the robot")
    add.add_argument("--fast", action="store_true", help="as fast as the robot goes, not at the recorded rate")
    add.add_argument("--url", help="send the observations to this policy service and compare the actions")
    add.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest difference of an action; exit code 1 "
                     "above it")  # fmt: skip
    add.add_argument("--api-key", help="or RECAP_API_KEY in the environment")
    add.add_argument("--tls-ca", type=Path, metavar="FILE", help="CA of services at wss:// (else the system's)")
    add.set_defaults(command=replay)


def replay(arguments: argparse.Namespace) -> int:
    """Print what a recording holds; step its actions through a robot, or send its observations to a service again."""
    rollout = read_rollout(arguments.file, images=False)
    outcome = {True: "success", False: "no success", None: "outcome unknown"}[rollout.success]
    print(f"{rollout.task!r} ({rollout.spec.robot}, seed {rollout.seed}): {rollout.steps} steps at "
          f"{rollout.control_hz:g} Hz, {outcome} ({rollout.reason})")  # fmt: skip
    by = f"demonstration, style {rollout.style}" if rollout.demonstration else f"policy {dict(rollout.policy or {})}"
    print(
        f"{by}; {int(rollout.intervention.sum())} steps under the operator; {rollout.missed_deadlines} missed "
        f"deadlines; cameras {', '.join(rollout.spec.camera_names)}{'' if rollout.complete else '; FILE INCOMPLETE'}"
        f"{'; recorded by the service: steps are requests' if rollout.source == 'service' else ''}"
        f"{_others(rollout)}"
    )
    if arguments.url is not None:
        return _again(arguments)
    return 0 if arguments.robot is None else _on_robot(arguments, rollout)


def _others(rollout: Rollout) -> str:
    versions = sorted({model.get("version", "?") for model in rollout.models.values()})
    return f"; {len(rollout.models)} steps by other models: version {', '.join(versions)}" if versions else ""


def _again(arguments: argparse.Namespace) -> int:
    """Differences by dimension; JSON as the last line."""
    key = arguments.api_key or os.environ.get("RECAP_API_KEY")
    headers = {"Authorization": f"Api-Key {key}"} if key else {}
    found, served, head = resend(arguments.file, arguments.url, tolerance=arguments.tolerance, headers=headers,
                                 tls_ca=arguments.tls_ca)  # fmt: skip
    names = [dim["name"] for dim in head["spec"]["action"]]
    largest = float(found.largest.max())
    within = largest <= arguments.tolerance
    mean = found.total / found.actions
    for name, most, usual in zip(names, found.largest, mean, strict=True):
        print(f"{name}: largest difference {most:.3g}, mean {usual:.3g}")
    print(json.dumps({
        "requests": found.requests, "actions": found.actions, "max_abs": largest, "mean_abs": float(mean.mean()),
        "by_dimension": {name: {"max_abs": float(most), "mean_abs": float(usual)}
                         for name, most, usual in zip(names, found.largest, mean, strict=True)},
        "tolerance": arguments.tolerance, "within": within, "lossy_frames": found.lossy,
        "recorded_model": head["policy"], "served_model": dict(served),
    }))  # fmt: skip
    return 0 if within else 1


def _on_robot(arguments: argparse.Namespace, rollout: Rollout) -> int:
    if rollout.source == "service":
        raise RolloutError(
            f"{arguments.file}: expected a robot's own recording, got one of the service, which does not know the "
            "executed actions; --url asks a service again"
        )
    step, worst, success = -1, 0.0, None
    robot = open_robot(arguments.robot, json.loads(arguments.robot_options))
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
