"""Write a checkpoint folder that loads from its path alone; reading is in recap_model/{policy,critic}/load.py."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from recap_model.normalize import NormStats
from recap_model.spec import Spec, write_spec
from recap_model.tokenizer import TextTokenizer


def write_checkpoint(
    folder: Path,
    weights: dict[str, Tensor],
    config: dict[str, Any],
    spec: Spec,
    tokenizer: TextTokenizer,
    stats: dict[str, NormStats],
) -> None:
    """All files but the manifest, into an existing (temporary) folder."""
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "norm_stats.json").write_text(json.dumps({k: v.to_json() for k, v in stats.items()}, indent=1) + "\n")
    write_spec(spec, folder / "spec.json")
    tokenizer.save(folder / "tokenizer.json")
    save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / "model.safetensors")
