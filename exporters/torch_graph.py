"""Policy checkpoint -> what the torch engine (`services/common/torch_engine.py`) needs in a version folder."""

import json
import shutil
from pathlib import Path

from exporters.wrap import Graph
from recap_model.policy.static import StaticPolicy

FILES = ("model.safetensors", "config.json", "norm_stats.json")
GRAPH = "graph.json"


class TorchGraphError(ValueError):
    """The torch engine does not run this graph, or its checkpoint lacks a file."""


def write_torch(graph: Graph, folder: Path) -> None:
    """Copy weights, config and statistics of `graph`'s checkpoint into the existing `folder`, and write graph.json.

    The weights are the checkpoint's own bytes; the number format of the matrix products is the engine's choice.
    Raises TorchGraphError for anything but a policy graph.
    """
    module = graph.module
    if not isinstance(module, StaticPolicy):
        raise TorchGraphError(
            f"{graph.name}: target torch: expected a policy, got {type(module).__name__}; the torch engine runs "
            f"policies alone, and onnxruntime serves the critic: `recap export {graph.files.path} --target onnx`"
        )
    missing = [name for name in FILES if not (graph.files.path / name).is_file()]
    if missing:
        raise TorchGraphError(
            f"{graph.files.path}: expected the files {', '.join(FILES)}, got no {', '.join(missing)}; "
            "export from a whole checkpoint folder"
        )
    for name in FILES:
        shutil.copyfile(graph.files.path / name, folder / name)
    options = {"guided": module.options.guided, "rtc": module.options.rtc}
    (folder / GRAPH).write_text(json.dumps(options, indent=1) + "\n")
