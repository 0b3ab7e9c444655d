"""LeRobot policy folders for tests, and actions through LeRobot's own processors."""

import json
from pathlib import Path

import numpy as np
import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from safetensors.torch import load_file

from recap_model import observation
from recap_model.policy.load import load_policy

TASK = "open the drawer"
CAMERAS, FRAME = ("c0", "c1"), (48, 64)


def statistics(seed: int = 5) -> dict[str, dict[str, torch.Tensor]]:
    g, out = torch.Generator().manual_seed(seed), {}
    for key, width in (("observation.state", 5), ("action", 4)):
        mean, std = torch.randn(width, generator=g), torch.rand(width, generator=g) + 0.2
        low, high = mean - 3 * std, mean + 2.5 * std
        out[key] = {"mean": mean, "std": std, "min": low, "max": high, "q01": low * 0.9, "q99": high * 0.8}
    return out


def save(policy: SmolVLAPolicy, folder: Path, stats: dict[str, dict[str, torch.Tensor]]) -> Path:
    """As LeRobot's training writes a checkpoint."""
    policy.save_pretrained(folder)
    for pipeline in make_smolvla_pre_post_processors(policy.config, stats):
        pipeline.save_pretrained(folder)
    return folder


def open_theirs(folder: Path):
    """(policy, preprocessor, postprocessor) as LeRobot opens them."""
    policy = SmolVLAPolicy.from_pretrained(folder, strict=True)
    pre = PolicyProcessorPipeline.from_pretrained(folder, config_filename="policy_preprocessor.json")
    post = PolicyProcessorPipeline.from_pretrained(
        folder,
        config_filename="policy_postprocessor.json",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return policy, pre, post


def raw(cameras, frame, state_dim, seed=0):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (*frame, 3), np.uint8) for name in cameras}
    return images, rng.normal(size=state_dim).astype(np.float32)


def their_actions(folder, images, state, task, noise):
    policy, pre, post = open_theirs(folder)
    batch = {f"observation.images.{k}": torch.from_numpy(v).permute(2, 0, 1) / 255 for k, v in images.items()}
    batch |= {"observation.state": torch.from_numpy(state), "task": task}
    return post(policy.predict_action_chunk(pre(batch), noise=noise))[0]


def our_actions(folder, images, state, prompt, noise):
    policy, files = load_policy(folder)
    x = observation.prepare(images, state, prompt, files.spec.robot, files.tokenizer)
    arrays = (x.images, x.state, x.tokens, x.token_mask)
    with torch.no_grad():
        return policy.sample_actions(*(torch.from_numpy(a)[None] for a in arrays), noise)[0]


def assert_same(ours, theirs):
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def assert_same_checkpoint(first: Path, second: Path, *, tokenizer: bool = True) -> None:
    for name in ("config.json", "norm_stats.json", "spec.json") + (("tokenizer.json",) if tokenizer else ()):
        assert json.loads((first / name).read_text()) == json.loads((second / name).read_text()), name
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
