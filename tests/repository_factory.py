"""Small real model repositories for tests: ONNX graphs that are easy to check by hand, run by the real engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim
from recap_model.manifest import publish, write_manifest
from recap_model.spec import CriticSpec, PolicySpec, Spec, write_spec
from recap_model.tokenizer import word_tokenizer

TASKS = ("press the button from above", "open the drawer", "open the door")
CHUNK, MAX_TOKENS, BINS = 8, 16, 201
T_MAX = 40.0

_TYPES = {
    "images": TensorProto.UINT8,
    "tokens": TensorProto.INT32,
    "token_mask": TensorProto.BOOL,
    "unconditional_tokens": TensorProto.INT32,
    "unconditional_mask": TensorProto.BOOL,
}


def robot_spec(size: int = 16, cameras: Sequence[str] = ("front", "top")) -> RobotSpec:
    return RobotSpec(
        "metaworld",
        tuple(Camera(name, size, size) for name in cameras),
        tuple(StateDim(name, "m") for name in "xyz") + (StateDim("gripper", "1"),),
        tuple(ActionDim(name, "1", -1.0, 1.0) for name in ("dx", "dy", "dz", "grip")),
        20.0,
        TASKS,
    )


def build_repository(
    root: Path,
    *,
    size: int = 16,
    models: Sequence[str] = ("policy", "policy_guided", "critic"),
    nan_actions: bool = False,
) -> Path:
    """Write `models` below `root` as `recap export` lays them out. nan_actions: the policy divides by zero."""
    robot = robot_spec(size)
    policy = PolicySpec(robot, CHUNK, MAX_TOKENS)
    critic = CriticSpec(robot, MAX_TOKENS, BINS, -1.0, 0.0, dict.fromkeys(TASKS, T_MAX))
    graphs = {
        "policy": lambda: policy_graph(policy, guided=False, nan=nan_actions),
        "policy_guided": lambda: policy_graph(policy, guided=True, nan=nan_actions),
        "critic": lambda: critic_graph(critic),
    }
    for name in models:
        _write(root / name, graphs[name](), critic if name == "critic" else policy)
    return root


def expected_actions(
    images: NDArray[Any], state: NDArray[Any], tokens: NDArray[Any], mask: NDArray[Any], noise: NDArray[Any]
) -> NDArray[np.float64]:
    """What the policy graph computes for one sample: [T, A]."""
    words = (tokens * mask).sum() / mask.sum()
    return 0.1 * noise + state.mean() + 0.01 * words + images.mean() / 255


def expected_value(images: NDArray[Any], state: NDArray[Any]) -> float:
    """What the critic graph centres its distribution on."""
    return float(np.clip(state[0] - 0.1 * images.mean() / 255, -1, 0))


def policy_graph(spec: PolicySpec, *, guided: bool, nan: bool = False) -> onnx.ModelProto:
    """actions = 0.1 noise + mean(state) + 0.01 mean(tokens) + mean(images) / 255; guided: u + beta (c - u)."""
    shapes = _inputs(spec.robot, spec.max_tokens) | {"noise": (spec.chunk, len(spec.robot.action))}
    nodes = [*_base(), *_words("tokens", "token_mask", "c")]
    if guided:
        shapes |= {"unconditional_tokens": (spec.max_tokens,), "unconditional_mask": (spec.max_tokens,), "beta": ()}
        nodes += [
            *_words("unconditional_tokens", "unconditional_mask", "u"),
            helper.make_node("Sub", ["c_mean", "u_mean"], ["delta"]),
            helper.make_node("Unsqueeze", ["beta", "axis_1"], ["beta_column"]),
            helper.make_node("Mul", ["delta", "beta_column"], ["scaled"]),
            helper.make_node("Add", ["u_mean", "scaled"], ["word"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["c_mean"], ["word"]))
    nodes += [
        helper.make_node("Mul", ["word", "hundredth"], ["small"]),
        helper.make_node("Add", ["sense", "small"], ["offset"]),
        helper.make_node("Unsqueeze", ["offset", "axis_2"], ["offset_3"]),
        helper.make_node("Mul", ["noise", "zero" if nan else "tenth"], ["drift"]),
        helper.make_node("Div", ["drift", "zero"], ["moved"])
        if nan
        else helper.make_node("Identity", ["drift"], ["moved"]),
        helper.make_node("Add", ["moved", "offset_3"], ["actions"]),
    ]
    shape = ["batch", spec.chunk, len(spec.robot.action)]
    outputs = [helper.make_tensor_value_info("actions", TensorProto.FLOAT, shape)]
    return _model(nodes, shapes, outputs)


def critic_graph(spec: CriticSpec) -> onnx.ModelProto:
    """A narrow softmax over the bins around clip(state[0] - 0.1 mean(images) / 255)."""
    nodes = [
        *_base(),
        helper.make_node("Gather", ["state", "first"], ["x"], axis=1),
        helper.make_node("Mul", ["picture", "tenth"], ["dim"]),
        helper.make_node("Sub", ["x", "dim"], ["raw"]),
        helper.make_node("Clip", ["raw", "minus_one", "zero"], ["centre"]),
        helper.make_node("Sub", ["bins", "centre"], ["off"]),
        helper.make_node("Mul", ["off", "off"], ["square"]),
        helper.make_node("Mul", ["square", "sharpness"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("Mul", ["probabilities", "bins"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "axis_1"], ["value"], keepdims=0),
    ]
    outputs = [
        helper.make_tensor_value_info("value", TensorProto.FLOAT, ["batch"]),
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", spec.bins]),
    ]
    bins = np.linspace(spec.value_low, spec.value_high, spec.bins, dtype=np.float32)[None]
    return _model(nodes, _inputs(spec.robot, spec.max_tokens), outputs, {"bins": bins})


def _inputs(robot: RobotSpec, max_tokens: int) -> dict[str, tuple[int, ...]]:
    camera = robot.cameras[0]
    return {
        "images": (len(robot.cameras), camera.height, camera.width, 3),
        "state": (len(robot.state),),
        "tokens": (max_tokens,),
        "token_mask": (max_tokens,),
    }


def _base() -> list[onnx.NodeProto]:
    """`picture` [B, 1] = mean of the images; `sense` [B, 1] = mean(state) + picture / 255."""
    return [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes_image"], ["brightness"], keepdims=0),
        helper.make_node("Unsqueeze", ["brightness", "axis_1"], ["bright_column"]),
        helper.make_node("Div", ["bright_column", "white"], ["picture"]),
        helper.make_node("ReduceMean", ["state", "axis_1"], ["state_mean"], keepdims=1),
        helper.make_node("Add", ["state_mean", "picture"], ["sense"]),
    ]


def _words(tokens: str, mask: str, prefix: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", [tokens], [f"{prefix}_ids"], to=TensorProto.FLOAT),
        helper.make_node("Cast", [mask], [f"{prefix}_on"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{prefix}_ids", f"{prefix}_on"], [f"{prefix}_shown"]),
        helper.make_node("ReduceSum", [f"{prefix}_shown", "axis_1"], [f"{prefix}_total"], keepdims=1),
        helper.make_node("ReduceSum", [f"{prefix}_on", "axis_1"], [f"{prefix}_count"], keepdims=1),
        helper.make_node("Div", [f"{prefix}_total", f"{prefix}_count"], [f"{prefix}_mean"]),
    ]


def _model(
    nodes: list[onnx.NodeProto],
    shapes: dict[str, tuple[int, ...]],
    outputs: list[Any],
    extra: dict[str, NDArray[Any]] | None = None,
) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(name, _TYPES.get(name, TensorProto.FLOAT), ["batch", *shape])
        for name, shape in shapes.items()
    ]
    numbers = {"hundredth": 0.01, "tenth": 0.1, "zero": 0.0, "minus_one": -1.0, "white": 255.0, "sharpness": -2000.0}
    constants: dict[str, NDArray[Any]] = {name: np.asarray(value, np.float32) for name, value in numbers.items()}
    constants |= {
        "axis_1": np.asarray([1]),
        "axis_2": np.asarray([2]),
        "axes_image": np.asarray([1, 2, 3, 4]),
        "first": np.asarray([0]),
    }
    constants |= extra or {}
    used = {name for node in nodes for name in node.input}
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _write(folder: Path, model: onnx.ModelProto, spec: Spec) -> None:
    with publish(folder / "1") as version:
        onnx.save(model, version / "model.onnx")
        write_spec(spec, version / "spec.json")
        word_tokenizer(TASKS, MAX_TOKENS).save(version / "tokenizer.json")
        (version / "parity.json").write_text("{}\n")
        write_manifest(version, "model")
    (folder / "config.pbtxt").write_text(f'name: "{folder.name}"\nbackend: "onnxruntime"\nmax_batch_size: 8\n')
