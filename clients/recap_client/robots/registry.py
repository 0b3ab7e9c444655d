"""Robots by name. Your own: `package.module:Class`, a class that offers the methods of `Robot`. One that LeRobot
drives: `lerobot:<type>`."""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, cast

from recap_client.robots.base import Robot, RobotError, Teleoperator

ROBOTS = {"metaworld": "recap_client.robots.metaworld:MetaWorldRobot"}
LEROBOT = "recap_client.robots.lerobot:LeRobotRobot"


def open_robot(name: str, options: Mapping[str, Any] | None = None) -> Robot:
    """Open a robot by its name here, as `lerobot:<type>` or as `module:Class`; options go to the class. Raises
    RobotError, and SpecError when the options give a spec that is not the robot's."""
    arguments, target = dict(options or {}), ROBOTS.get(name, name)
    family, _, kind = name.partition(":")
    if family == "lerobot" and kind:
        arguments["type"], target = kind, LEROBOT
    module, _, attribute = target.partition(":")
    if not attribute:
        raise RobotError(
            f"robot: expected one of {sorted(ROBOTS)}, 'lerobot:TYPE' or 'package.module:Class', got {name!r}"
        )
    try:
        factory = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RobotError(f"robot {name!r}: cannot import {attribute} from {module}: {error}") from error
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise RobotError(
            f"robot {name!r}: options: expected those of {attribute}, got {sorted(arguments)}: {error}"
        ) from error
    return cast(Robot, factory(**arguments))


def teleoperator_of(robot: Robot, seed: int, style: str) -> Callable[[], Teleoperator]:
    """A function that puts the robot's human in charge. Raises RobotError for a robot without one."""
    make = getattr(robot, "teleoperator", None)
    if make is None:
        raise RobotError(f"robot {robot.spec.robot!r}: expected a method teleoperator(seed, style), found none")
    return lambda: cast(Teleoperator, make(seed, style))
