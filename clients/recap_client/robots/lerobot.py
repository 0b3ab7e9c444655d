"""A LeRobot robot (0.6) as a robot of ours: `--robot lerobot:so101_follower`, made by LeRobot's own factory.

Needs the extra `lerobot` (`pip install 'recap-client[lerobot]'`); importing this module does not. Robots, cameras and
teleoperators of third-party plug-ins (`lerobot_robot_*`, ...) are found as LeRobot finds them.
"""

import contextlib
import json
import pkgutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_client.robots.base import Observation, RobotError, StepResult
from recap_client.spec import ActionDim, Camera, RobotSpec, SpecError, StateDim

FRESH_S = 0.2
"""Age of an observation [s] up to which its position still counts as the present one."""

Limits = Mapping[str, Sequence[float]] | Sequence[float]


class LeRobotRobot:
    """Implements `Robot` over `lerobot.robots.Robot`.

    type: LeRobot's name of the robot; config: its configuration without `type` (port, id, cameras, ...). Either `spec`,
    a JSON file with a robot spec (a model's `spec.json`, a dataset's `meta/recap_spec.json`), or `control_hz`, `limits`
    ([low, high] for all action dimensions, or a map by name) and, if wanted, `units` (by name, else "1") and `tasks`.
    LeRobot calls every dimension by its name, so vectors come in the order of the spec.

    teleop: {"type": ..., ...} of the LeRobot teleoperator for demonstrations and takeovers. episode_s: after which an
    episode ends, outcome unknown.

    The spec is checked against the robot's features before it is connected (SpecError with expected and got). A device
    that is not calibrated is refused (RobotError): calibration asks questions and belongs to `lerobot-calibrate`.
    """

    def __init__(self, type: str, config: Mapping[str, Any] | None = None, *, spec: str | None = None,
                 control_hz: float | None = None, limits: Limits | None = None,
                 units: Mapping[str, str] | None = None, tasks: Sequence[str] = (),
                 teleop: Mapping[str, Any] | None = None, episode_s: float = 60.0) -> None:  # fmt: skip
        self._robot = _make("robots", type, config or {})
        self._teleop_config, self._teleop = teleop, None
        derived = None if spec else derive_spec(self._robot, control_hz, limits, units or {}, tasks)
        self.spec = derived or read_spec(Path(str(spec)), tasks)
        check_features(self.spec, self._robot)
        self._state = [dim.name for dim in self.spec.state]
        self._action = [dim.name for dim in self.spec.action]
        self._limit, self._steps = round(episode_s * self.spec.control_hz), 0
        self._seen: tuple[float, Mapping[str, Any]] | None = None
        self._held: dict[str, float] | None = None
        _connect(self._robot)

    def prompt(self, task: str) -> str:
        if self.spec.tasks and task not in self.spec.tasks:
            raise RobotError(f"lerobot: task: expected one of {list(self.spec.tasks)}, got {task!r}")
        return task

    def reset(self, task: str, seed: int) -> None:  # noqa: ARG002 - a real scene has no seed
        self.prompt(task)
        self._steps, self._held = 0, None

    def observe(self) -> Observation:
        began = time.monotonic()
        raw = self._robot.get_observation()
        self._seen = (began, raw)
        images = {camera.name: self._frame(raw, camera) for camera in self.spec.cameras}
        return Observation(images, self._vector(raw, self._state, "observation"), began)

    def act(self, action: NDArray[np.float32]) -> StepResult:
        self._held = None
        return self._send({name: float(value) for name, value in zip(self._action, action)})  # noqa: B905

    def hold(self) -> StepResult:
        """Send the present position again (velocities: zero). The position is taken once: an arm that sags under its
        weight would otherwise follow its own sagging."""
        if self._held is None:
            self._held = self._present()
        return self._send(self._held)

    def teleoperator(self, seed: int, style: str) -> "LeRobotTeleoperator":  # noqa: ARG002 - a real human
        """The human at the LeRobot teleoperator of the options. Raises RobotError without one."""
        if self._teleop_config is None:
            raise RobotError(
                'lerobot: no teleoperator: give one in the options, e.g. "teleop": {"type": "so101_leader"}'
            )
        if self._teleop is None:
            options = dict(self._teleop_config)
            teleop = _make("teleoperators", str(options.pop("type", "")), options)
            _require_names("teleoperator", self._action, list(teleop.action_features))
            _connect(teleop)
            self._teleop = teleop
        return LeRobotTeleoperator(self._teleop, self._action)

    def close(self) -> None:
        for device in (self._teleop, self._robot):
            if device is not None and device.is_connected:
                device.disconnect()

    def _send(self, command: dict[str, float]) -> StepResult:
        sent = self._robot.send_action(dict(command)) or {}
        self._steps += 1
        applied = [float(sent.get(name, command[name])) for name in self._action]
        return StepResult(self._steps >= self._limit, None, np.array(applied, np.float32))

    def _present(self) -> dict[str, float]:
        if self._seen is None or time.monotonic() - self._seen[0] > FRESH_S:
            self._seen = (time.monotonic(), self._robot.get_observation())
        raw = self._seen[1]
        unknown = [name for name in self._action if not name.endswith(".vel") and name not in raw]
        if unknown:
            raise RobotError(f"lerobot: cannot hold: expected the present position of {unknown} among {sorted(raw)}")
        return {name: 0.0 if name.endswith(".vel") else float(raw[name]) for name in self._action}

    def _frame(self, raw: Mapping[str, Any], camera: Camera) -> NDArray[np.uint8]:
        frame = np.asarray(raw.get(camera.name))
        if frame.shape != (camera.height, camera.width, 3) or frame.dtype != np.uint8:
            raise RobotError(f"lerobot: camera {camera.name}: expected uint8 [{camera.height}, {camera.width}, 3], got "
                             f"{frame.dtype} {list(frame.shape)}")  # fmt: skip
        return frame

    def _vector(self, raw: Mapping[str, Any], names: Sequence[str], what: str) -> NDArray[np.float32]:
        missing = [name for name in names if name not in raw]
        if missing:
            raise RobotError(f"lerobot: {what}: expected {list(names)}, got none of {missing}")
        return np.array([float(raw[name]) for name in names], np.float32)


class LeRobotTeleoperator:
    """Implements `Teleoperator` over `lerobot.teleoperators.Teleoperator`."""

    style = "human"

    def __init__(self, device: Any, names: Sequence[str]) -> None:
        self._device, self._names = device, list(names)

    def action(self) -> NDArray[np.float32]:
        moved = self._device.get_action()
        _require_names("teleoperator", self._names, list(moved))
        return np.array([float(moved[name]) for name in self._names], np.float32)


def derive_spec(robot: Any, control_hz: float | None, limits: Limits | None, units: Mapping[str, str],
                tasks: Sequence[str]) -> RobotSpec:  # fmt: skip
    """The spec of a robot for which there is none yet: names, order and cameras from its features. Raises SpecError."""
    if control_hz is None or limits is None:
        raise SpecError("lerobot: expected in the options either spec (a file), or control_hz and limits; got "
                        f"control_hz {control_hz} and limits {limits}")  # fmt: skip
    state, cameras = _features(robot)
    names = list(robot.action_features)
    known = limits if isinstance(limits, Mapping) else dict.fromkeys(names, limits)
    _require_names("limits", names, list(known))
    action = [ActionDim(name, units.get(name, "1"), *map(float, known[name])) for name in names]
    return RobotSpec(str(robot.name), tuple(cameras.values()), tuple(StateDim(n, units.get(n, "1")) for n in state),
                     tuple(action), float(control_hz), tuple(tasks))  # fmt: skip


def read_spec(path: Path, tasks: Sequence[str] = ()) -> RobotSpec:
    """A robot spec from a JSON file: its own, or under the key `robot` of a model's. Raises SpecError."""
    try:
        data = json.loads(path.read_text())
        spec = RobotSpec.from_json(data["robot"] if isinstance(data.get("robot"), dict) else data)
    except (OSError, ValueError, AttributeError) as error:
        raise SpecError(f"{path}: expected the JSON of a robot spec: {error}") from error
    return replace(spec, tasks=tuple(tasks) or spec.tasks)


def check_features(spec: RobotSpec, robot: Any) -> None:
    """Raise SpecError unless the robot has every state and camera of the spec (it may have more), and exactly its
    actions."""
    state, cameras = _features(robot)
    for what, wanted, there in (("state", [dim.name for dim in spec.state], state),
                                ("cameras", list(spec.camera_names), list(cameras))):  # fmt: skip
        missing = [name for name in wanted if name not in there]
        if missing:
            raise SpecError(f"lerobot: {robot.name}: {what}: expected {wanted} (spec), got {there}: no {missing}")
    for camera in spec.cameras:
        if cameras[camera.name] != camera:
            raise SpecError(f"lerobot: {robot.name}: camera: expected {camera} (spec), got {cameras[camera.name]}")
    _require_names(f"{robot.name}: action", [dim.name for dim in spec.action], list(robot.action_features))


def _features(robot: Any) -> tuple[list[str], dict[str, Camera]]:
    """Names of the state, and the colour cameras, of `observation_features`."""
    features = robot.observation_features
    state = [name for name, kind in features.items() if not isinstance(kind, tuple)]
    cameras = {name: Camera(name, *map(int, kind[:2])) for name, kind in features.items()
               if isinstance(kind, tuple) and len(kind) == 3 and kind[2] == 3}  # fmt: skip
    return state, cameras


def _require_names(what: str, expected: list[str], got: list[str]) -> None:
    if set(expected) != set(got):
        raise SpecError(f"lerobot: {what}: expected {expected}, got {got}: missing {sorted(set(expected) - set(got))}, "
                        f"unknown {sorted(set(got) - set(expected))}")  # fmt: skip


def _connect(device: Any) -> None:
    try:
        if not device.is_connected:
            device.connect(calibrate=False)
        if not device.is_calibrated:
            raise RobotError("expected a calibrated device; run lerobot-calibrate first")
    except Exception as error:
        with contextlib.suppress(Exception):
            device.disconnect()
        raise RobotError(f"lerobot: {device}: cannot be connected: {error}") from error


def _make(family: str, type: str, config: Mapping[str, Any]) -> Any:
    """A robot or teleoperator by LeRobot's factory. family: "robots" | "teleoperators"."""
    base, factory = {"robots": ("RobotConfig", "make_robot_from_config"),
                     "teleoperators": ("TeleoperatorConfig", "make_teleoperator_from_config")}[family]  # fmt: skip
    try:
        package = import_module(f"lerobot.{family}")
        draccus = import_module("draccus")
        import_module("lerobot.utils.import_utils").register_third_party_plugins()
    except ImportError as error:
        raise RobotError(
            f"lerobot: not installed ({error}); run: pip install 'recap-client[lerobot]' and the extra of your robot, "
            "e.g. 'lerobot[feetech]'"
        ) from error
    failed = {**_register("cameras"), **_register(family)}
    kinds = getattr(package, base)
    if type not in kinds.get_known_choices():
        raise RobotError(f"lerobot: {family}: expected one of {sorted(kinds.get_known_choices())}, got {type!r}; "
                         f"not importable: {failed or 'none'}")  # fmt: skip
    try:
        return getattr(package, factory)(draccus.decode(kinds, {"type": type, **config}))
    except Exception as error:  # draccus, the device's own checks, a missing SDK
        raise RobotError(f"lerobot: {type}: cannot be made from {dict(config)}: {error}") from error


def _register(family: str) -> dict[str, str]:
    """Import LeRobot's own devices of a family, so that their types are known; those whose SDK is missing, and why."""
    package, failed = import_module(f"lerobot.{family}"), {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            try:
                import_module(f"lerobot.{family}.{module.name}")
            except ImportError as error:
                failed[module.name] = str(error)
    return failed
