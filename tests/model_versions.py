"""Further versions of the small policy of `repository_factory`, told apart by their actions."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from recap_model.manifest import publish, write_manifest
from recap_model.spec import PolicySpec, write_spec
from recap_model.tokenizer import word_tokenizer
from repository_factory import CHUNK, MAX_TOKENS, TASKS, policy_graph, robot_spec

SHIFT = 0.05
"""Small against the limits of the actions, large against their arithmetic."""


def add_version(root: Path, version: int, *, shift: float = 0.0, nan: bool = False, chunk: int = CHUNK) -> Path:
    """Write `root`/policy/`version`: version 1's actions plus `shift`."""
    spec = PolicySpec(robot_spec(), chunk, MAX_TOKENS)
    graph = policy_graph(spec, guided=False, nan=nan)
    last = next(node for node in graph.graph.node if node.output == ["actions"])
    last.output[0] = "unshifted"
    graph.graph.initializer.append(helper.make_tensor("shift", TensorProto.FLOAT, [], [shift]))
    graph.graph.node.append(helper.make_node("Add", ["unshifted", "shift"], ["actions"]))
    folder = root / "policy" / str(version)
    with publish(folder) as made:
        onnx.save(graph, made / "model.onnx")
        write_spec(spec, made / "spec.json")
        word_tokenizer(TASKS, MAX_TOKENS).save(made / "tokenizer.json")
        write_manifest(made, "model")
    return folder
