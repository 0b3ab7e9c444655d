"""Checkpoint -> the functions that are exported: positional tensors in, tensors out, with names and example shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recap_model.checkpoint import CheckpointFiles
from recap_model.conditioning import positive_prompt, unconditional_prompt
from recap_model.critic.load import load_critic
from recap_model.manifest import read_manifest
from recap_model.policy.load import load_policy
from recap_model.spec import PolicySpec


@dataclass(frozen=True)
class Graph:
    """One model to export. name: folder in the model repository. example(batch, seed): named inputs, seeded."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    files: CheckpointFiles
    example: Callable[[int, int], dict[str, NDArray[Any]]]

    def run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The torch answer to named numpy inputs."""
        with torch.no_grad():
            answer = self.module(*(torch.from_numpy(inputs[name]) for name in self.inputs))
        answer = (answer,) if isinstance(answer, Tensor) else answer
        return {name: value.numpy() for name, value in zip(self.outputs, answer, strict=True)}


class _Call(nn.Module):
    """Makes one method of a module its forward."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Tensor) -> Any:
        return getattr(self.module, self.method)(*args)


OBSERVATION = ("images", "state", "tokens", "token_mask")


def load_graphs(checkpoint: Path, *, guided: bool) -> list[Graph]:
    """The graphs of a policy (`policy`, and `policy_guided` if asked) or critic (`critic`) checkpoint."""
    kind = read_manifest(checkpoint).kind
    if kind == "critic":
        critic, files = load_critic(checkpoint)
        return [Graph("critic", critic, OBSERVATION, ("value", "probabilities"), files, _examples(files, OBSERVATION))]
    policy, files = load_policy(checkpoint)
    plain = (*OBSERVATION, "noise")
    graphs = [Graph("policy", _Call(policy, "sample_actions"), plain, ("actions",), files, _examples(files, plain))]
    if guided:
        names = (*OBSERVATION, "unconditional_tokens", "unconditional_mask", "beta", "noise")
        module = _Call(policy, "sample_actions_guided")
        graphs.append(Graph("policy_guided", module, names, ("actions",), files, _examples(files, names)))
    return graphs


def _examples(files: CheckpointFiles, names: tuple[str, ...]) -> Callable[[int, int], dict[str, NDArray[Any]]]:
    """Seeded inputs of any batch size: random frames, states around the data's mean, real prompts."""
    robot = files.spec.robot
    mean, std = files.stats["state"].mean, files.stats["state"].std

    def make(batch: int, seed: int) -> dict[str, NDArray[Any]]:
        rng = np.random.default_rng([seed, batch])
        camera = robot.cameras[0]
        tasks = [robot.tasks[i] for i in rng.integers(0, len(robot.tasks), batch)]
        text = [files.tokenizer(positive_prompt(task)) for task in tasks]
        bare = [files.tokenizer(unconditional_prompt(task)) for task in tasks]
        shape = (batch, len(robot.cameras), camera.height, camera.width, 3)
        every: dict[str, NDArray[Any]] = {
            "images": rng.integers(0, 256, shape, np.uint8),
            "state": (mean + std * rng.normal(size=(batch, len(mean)))).astype(np.float32),
            "tokens": np.stack([ids for ids, _ in text]),
            "token_mask": np.stack([mask for _, mask in text]),
            "unconditional_tokens": np.stack([ids for ids, _ in bare]),
            "unconditional_mask": np.stack([mask for _, mask in bare]),
            "beta": rng.uniform(1.0, 2.5, batch).astype(np.float32),
        }
        if isinstance(files.spec, PolicySpec):
            size = (batch, files.spec.chunk, len(robot.action))
            every["noise"] = rng.normal(size=size).astype(np.float32)
        return {name: every[name] for name in names}

    return make
