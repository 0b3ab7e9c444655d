"""A Meta-World arm as a robot: 20 Hz control, two 64 x 64 cameras, proprioception, a script in place of the human.

Needs the extra `sim` (`pip install 'recap-client[sim]'`); importing this module does not. The policy sees no object
positions: they are open only to the scripted expert (`full_observation`).
"""

import atexit
import os
import time
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_client.robots.base import Observation, RobotError, StepResult, Teleoperator
from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim

TASKS = {
    "button-press-topdown": "press the button from above",
    "drawer-open": "open the drawer",
    "door-open": "open the door",
    "drawer-close": "close the drawer",
    "window-open": "open the window",
    "faucet-open": "turn the faucet",
}
"""Task name -> language prompt. The simulator's own name is the task name + "-v3"."""

SIMULATOR_HZ = 80
IMAGE_SIZE = 64

_STATE = (StateDim("x", "m"), StateDim("y", "m"), StateDim("z", "m"), StateDim("gripper", "1"))
_ACTION = tuple(ActionDim(name, "1", -1.0, 1.0) for name in ("dx", "dy", "dz", "gripper"))

# name -> (camera of the simulator's model, position [m], vertical field of view [deg] or None, flip both axes).
# The stock positions are too far away for 64 pixels, and corner2 is mounted upside down.
_CAMERAS: dict[str, tuple[str, tuple[float, float, float], float | None, bool]] = {
    "front": ("corner2", (0.75, 0.075, 0.7), None, True),
    "top": ("topview", (0.0, 0.62, 1.5), 36.0, False),
}

# Meshes that a camera never sees (half of the triangles of the scene): leaving them out changes no pixel.
_UNSEEN = {"top": ("head", "base", "l0", "l1")}

_renderers: dict[str, Any] = {}
"""Task name -> renderer of this process. A renderer is 0.2 s and a GL context, so robots of one process share it."""


def metaworld_spec(control_hz: float = 20) -> RobotSpec:
    """The spec of this robot, without opening the simulator."""
    cameras = tuple(Camera(name, IMAGE_SIZE, IMAGE_SIZE) for name in _CAMERAS)
    return RobotSpec("metaworld", cameras, _STATE, _ACTION, float(control_hz), tuple(TASKS.values()))


class MetaWorldRobot:
    """Implements `Robot`. The same (task, seed) always gives the same scene, whatever was run before.

    control_hz must divide 80 (an action is repeated for 80 / control_hz simulator steps of 12.5 ms, fewer if it
    succeeds); episode_limit: control steps after which the episode ends without success.
    """

    def __init__(self, control_hz: int = 20, episode_limit: int = 62) -> None:
        if control_hz < 1 or SIMULATOR_HZ % control_hz:
            raise RobotError(f"metaworld: control_hz: expected a divisor of {SIMULATOR_HZ}, got {control_hz}")
        self.spec = metaworld_spec(control_hz)
        self.episode_limit = episode_limit
        self.task = ""
        self.full_observation: NDArray[np.float64] = np.zeros(39)
        self._repeat = SIMULATOR_HZ // control_hz
        self._environments: dict[str, Any] = {}
        self._unseen_geoms: dict[tuple[str, str], list[int]] = {}
        self._steps = 0
        self._gripper = 0.0
        self._simulator = _import_simulator()

    def prompt(self, task: str) -> str:
        return TASKS[self._task_name(task)]

    def reset(self, task: str, seed: int) -> None:
        name = self._task_name(task)
        if name not in self._environments:
            self._environments[name] = self._make(name)
        environment = self._environments[name]
        environment.seed(seed)
        self.full_observation = np.asarray(environment.reset()[0])
        self.task, self._steps, self._gripper = name, 0, 0.0

    def observe(self) -> Observation:
        """Renders both cameras (about 7 ms on a CPU)."""
        environment, renderer = self._environment(), self._renderer()
        images = {}
        for name, (camera, _, _, flip) in _CAMERAS.items():
            unseen = self._unseen(name)
            opacity = environment.model.geom_rgba[unseen, 3]
            environment.model.geom_rgba[unseen, 3] = 0.0
            renderer.update_scene(environment.data, camera=camera)
            environment.model.geom_rgba[unseen, 3] = opacity
            frame = renderer.render()
            images[name] = np.ascontiguousarray(frame[::-1, ::-1] if flip else frame)
        return Observation(images, self.full_observation[:4].astype(np.float32), time.monotonic())

    def act(self, action: NDArray[np.float32]) -> StepResult:
        environment = self._environment()
        applied = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        if applied.shape != (len(_ACTION),) or not np.isfinite(applied).all():
            raise RobotError(f"metaworld: action: expected {len(_ACTION)} finite numbers, got {action!r}")
        self._gripper = float(applied[3])
        success = False
        for _ in range(self._repeat):
            observation, _, _, _, info = environment.step(applied)
            if info["success"]:
                success = True
                break
        self.full_observation = np.asarray(observation)
        self._steps += 1
        done = success or self._steps >= self.episode_limit
        return StepResult(done, success if done else None, applied)

    def hold(self) -> StepResult:
        return self.act(np.array([0.0, 0.0, 0.0, self._gripper], np.float32))

    def teleoperator(self, seed: int, style: str = "mixed") -> Teleoperator:
        """The scripted human for the episode that `reset` began; styles: see `robots.expert`."""
        from recap_client.robots.expert import ScriptedExpert

        return ScriptedExpert(self, seed, style)

    def close(self) -> None:
        for environment in self._environments.values():
            environment.close()
        self._environments.clear()

    def _task_name(self, task: str) -> str:
        name = {prompt: name for name, prompt in TASKS.items()}.get(task, task)
        if name not in TASKS:
            raise RobotError(f"metaworld: task: expected one of {sorted(TASKS)} or its prompt, got {task!r}")
        return name

    def _environment(self) -> Any:
        if self.task not in self._environments:
            raise RobotError("metaworld: no episode: call reset(task, seed) first")
        return self._environments[self.task]

    def _make(self, name: str) -> Any:
        environments, _ = self._simulator
        environment = environments[name + "-v3"]()
        environment._freeze_rand_vec = False
        environment._set_task_called = True
        environment._partially_observable = False
        # computed while the goal was still hidden, it would clip the goal to zero
        environment.__dict__.pop("sawyer_observation_space", None)
        environment.seeded_rand_vec = True
        environment.max_path_length = max(500, self.episode_limit * self._repeat + 1)
        model = environment.model
        model.vis.quality.shadowsize = 0  # seven times faster, and the scene needs no shadows
        model.vis.quality.offsamples = 0
        model.mat_reflectance[:] = 0
        for camera, position, field_of_view, _ in _CAMERAS.values():
            model.cam(camera).pos[:] = position
            if field_of_view is not None:
                model.cam(camera).fovy[:] = field_of_view
        return environment

    def _unseen(self, camera: str) -> list[int]:
        """Numbers of the geoms that need not be drawn for a camera."""
        model = self._environment().model
        if (self.task, camera) not in self._unseen_geoms:
            meshes = [model.mesh(name).id for name in _UNSEEN.get(camera, ())]
            _, mujoco = self._simulator
            self._unseen_geoms[self.task, camera] = [
                geom for geom in range(model.ngeom)
                if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH and model.geom_dataid[geom] in meshes
            ]  # fmt: skip
        return self._unseen_geoms[self.task, camera]

    def _renderer(self) -> Any:
        _, mujoco = self._simulator
        model = self._environment().model
        if self.task not in _renderers:
            try:
                _renderers[self.task] = mujoco.Renderer(model, IMAGE_SIZE, IMAGE_SIZE)
            except Exception as error:  # FatalError, AttributeError, ImportError: depends on what is missing
                raise RobotError(
                    f"metaworld: cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error}; install the EGL "
                    "libraries (Debian: libegl1 libgles2 libgl1-mesa-dri)"
                ) from error
            if len(_renderers) == 1:
                atexit.register(_close_renderers)  # after mujoco's own, so that it runs before it
        renderer = _renderers[self.task]
        renderer._model = model  # Meta-World moves bodies inside the model: the meshes are shared, the poses are not
        return renderer


def _import_simulator() -> tuple[Any, Any]:
    """(task name -> environment class, mujoco). The GL back end must be chosen before mujoco is first imported."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa on a CPU: threads of its own only cost at 64 pixels
    try:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    except ImportError as error:
        raise RobotError(
            f"metaworld: the simulator is not installed ({error}); run: pip install 'recap-client[sim]'"
        ) from error
    _use_egl_after_all()
    warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")  # a warning a step from its experts
    return ALL_V3_ENVIRONMENTS, mujoco


def _close_renderers() -> None:
    """While the GL library is still loaded: at interpreter shutdown their finalizers fail noisily."""
    for renderer in _renderers.values():
        renderer.close()
    _renderers.clear()


def _use_egl_after_all() -> None:
    """mujoco picks its GL library when it is first imported; if other code did that, without a display the choice is
    one that aborts the process. The renderer looks the choice up when it is made, so it can still be corrected."""
    if os.environ.get("MUJOCO_GL") != "egl":
        return
    from mujoco.rendering.classic import gl_context

    if gl_context.GLContext.__module__ != "mujoco.egl":
        from mujoco.egl import GLContext

        gl_context.GLContext = GLContext
