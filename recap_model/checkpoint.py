"""The parts of a checkpoint folder that need no torch: config, spec, tokenizer, statistics, manifest."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recap_model.manifest import Manifest, verify
from recap_model.normalize import NormStats
from recap_model.spec import Spec, read_spec
from recap_model.tokenizer import TextTokenizer


@dataclass(frozen=True)
class CheckpointFiles:
    """config: the sizes, as JSON. stats: "state" and "action" statistics of the data the model was first trained on."""

    path: Path
    config: dict[str, Any]
    spec: Spec
    tokenizer: TextTokenizer
    stats: dict[str, NormStats]
    manifest: Manifest


def read_checkpoint(path: Path, kind: str) -> CheckpointFiles:
    """Read and verify a checkpoint folder of the given kind ("policy" or "critic"); weights are read by the model."""
    path = Path(path)
    manifest = verify(path, kind)
    spec = read_spec(path / "spec.json")
    stats = {k: NormStats.from_json(v) for k, v in json.loads((path / "norm_stats.json").read_text()).items()}
    tokenizer = TextTokenizer.load(path / "tokenizer.json", spec.max_tokens)
    return CheckpointFiles(path, json.loads((path / "config.json").read_text()), spec, tokenizer, stats, manifest)
