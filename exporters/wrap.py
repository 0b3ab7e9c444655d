"""Checkpoint -> the functions that are exported: positional tensors in, tensors out, with names and example shapes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from recap_model.policy.model import Policy
from recap_model.policy.static import OBSERVATION, GraphOptions, StaticPolicy
from recap_model.policy.static_parts import Attention
from recap_model.rtc import guidance_weights, prefix_weights
from recap_model.spec import PolicySpec


@dataclass(frozen=True)
class Graph:
    """One model to export. name: folder in the model repository. module: what is exported; reference: what it must
    equal, called with the same tensors in order. example(batch, seed): named inputs, seeded."""

    name: str
    module: nn.Module
    reference: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    files: CheckpointFiles
    example: Callable[[int, int], dict[str, NDArray[Any]]]

    def run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The torch answer to named numpy inputs."""
        with torch.no_grad():
            answer = self.reference(*(torch.from_numpy(inputs[name]) for name in self.inputs))
        answer = (answer,) if isinstance(answer, Tensor) else answer
        return {name: value.numpy() for name, value in zip(self.outputs, answer, strict=True)}


def _guided(policy: Policy) -> Callable[..., Tensor]:
    """`Policy.sample_actions_guided` with its arguments in the graph's order."""

    def call(*inputs: Tensor) -> Tensor:
        return policy.sample_actions_guided(**dict(zip(GraphOptions(guided=True).inputs, inputs, strict=True)))

    return call


def load_graphs(
    checkpoint: Path,
    *,
    guided: bool,
    rtc: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "matmul",
) -> list[Graph]:
    """The graphs of a policy (`policy`, and `policy_guided` if asked) or critic (`critic`) checkpoint.

    rtc: with the inputs of real-time chunking. dtype, attention: see `GraphOptions`.
    """
    kind = read_manifest(checkpoint).kind
    if kind == "critic":
        critic, files = load_critic(checkpoint)
        examples = _examples(files, OBSERVATION, critic.config.state_dim)
        return [Graph("critic", critic, critic, OBSERVATION, ("value", "probabilities"), files, examples)]
    policy, files = load_policy(checkpoint)
    plain = GraphOptions(rtc=rtc, dtype=dtype, attention=attention)
    wanted = [("policy", plain)] + ([("policy_guided", replace(plain, guided=True))] if guided else [])
    return [policy_graph(name, policy, options, files) for name, options in wanted]


def policy_graph(name: str, policy: Policy, options: GraphOptions, files: CheckpointFiles) -> Graph:
    """One graph of a policy. With real-time chunking the reference is the same graph in fp32: `Policy` has none."""
    if options.rtc:
        reference: Callable[..., Any] = StaticPolicy(
            policy, replace(options, dtype=torch.float32, attention="matmul")
        ).eval()
    else:
        reference = _guided(policy) if options.guided else policy.sample_actions
    examples = _examples(files, options.inputs, policy.config.padded_action)
    return Graph(name, StaticPolicy(policy, options).eval(), reference, options.inputs, ("actions",), files, examples)


def _examples(
    files: CheckpointFiles, names: tuple[str, ...], width: int
) -> Callable[[int, int], dict[str, NDArray[Any]]]:
    """Seeded inputs of any batch size: random frames, states around the data's mean, real prompts; noise of `width`."""
    robot = files.spec.robot
    told = files.spec.text if isinstance(files.spec, PolicySpec) else str
    mean, std = files.stats["state"].mean, files.stats["state"].std

    def make(batch: int, seed: int) -> dict[str, NDArray[Any]]:
        rng = np.random.default_rng([seed, batch])
        camera = robot.cameras[0]
        tasks = [robot.tasks[i] for i in rng.integers(0, len(robot.tasks), batch)]
        text = [files.tokenizer(positive_prompt(told(task))) for task in tasks]
        bare = [files.tokenizer(unconditional_prompt(told(task))) for task in tasks]
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
            chunk = files.spec.chunk
            every["noise"] = rng.normal(size=(batch, chunk, width)).astype(np.float32)
            if "previous" in names:
                every |= _chunking(rng, batch, chunk, files)
        return {name: every[name] for name in names}

    return make


def _chunking(rng: np.random.Generator, batch: int, chunk: int, files: CheckpointFiles) -> dict[str, NDArray[Any]]:
    """A previous chunk around the data's mean, held to over half of the chunk."""
    action, steps = files.stats["action"], files.config["denoise_steps"]
    previous = action.mean + action.std * rng.normal(size=(batch, chunk, len(action.mean)))
    weights = [prefix_weights(int(rng.integers(0, chunk)), max(chunk // 2, 1), chunk) for _ in range(batch)]
    return {
        "previous": previous.astype(np.float32),
        "prefix_weights": np.stack(weights),
        "guidance_weights": np.tile(guidance_weights(steps), (batch, 1)),
    }
