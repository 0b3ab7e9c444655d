"""Does the policy do what its prompt says? One checkpoint in simulation under every prompt: positive, negative, none.

The services can only say `positive`. Here the checkpoint runs in the process of the simulator, on the same scenes and
with the same flow noise for every prompt, so that a difference is the prompt's.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recap_client.episode import EpisodeResult, LoopSettings
from recap_client.fleet import FleetSettings, jobs_for, run_fleet
from recap_client.policy import Chunk
from recap_client.robots.base import Observation
from recap_client.robots.registry import open_robot
from recap_client.spec import RobotSpec
from recap_model import conditioning
from recap_model.manifest import read_manifest
from recap_model.spec import PolicySpec
from recap_model.statistics import throughput_ratio
from training.evaluate import NAME, SCHEMA, statistics

INDICATORS = {
    "positive": conditioning.POSITIVE,
    "negative": conditioning.NEGATIVE,
    "none": conditioning.NONE,
}


class ProbeError(ValueError):
    """A variant that cannot be probed."""


@dataclass(frozen=True)
class Variant:
    """prompt: a key of INDICATORS; beta: guidance strength (1 = none), only for the positive prompt."""

    prompt: str
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.prompt not in INDICATORS:
            raise ProbeError(f"prompt: expected one of {sorted(INDICATORS)}, got {self.prompt!r}")
        if self.beta < 1.0 or (self.beta > 1.0 and self.prompt != "positive"):
            raise ProbeError(f"beta: expected 1, or more with the prompt 'positive', got {self.beta} ({self.prompt})")

    @property
    def name(self) -> str:
        """Of its folder and its row."""
        return self.prompt if self.beta == 1.0 else f"{self.prompt}-beta-{self.beta:g}"


class CheckpointPolicy:
    """A checkpoint as a policy in this process, with any prompt. Noise is drawn as the service draws it: from (episode
    seed, number of the request), so that both give the same episode up to rounding."""

    def __init__(self, spec: RobotSpec, checkpoint: str, prompt: str, beta: float, noise_scale: float = 1.0) -> None:
        import torch

        from recap_client.spec import require_equal
        from recap_model.policy.load import load_policy

        torch.set_num_threads(1)  # workers are processes: threads of their own would wait for each other
        self._torch = torch
        self._policy, self._files = load_policy(Path(checkpoint))
        assert isinstance(self._files.spec, PolicySpec)
        self._prompt_text = self._files.spec.text
        require_equal(self._files.spec.robot, spec, what=f"robot against {checkpoint}")
        self._indicator, self._beta, self._noise_scale = INDICATORS[prompt], beta, np.float32(noise_scale)
        self._seed, self._seq = 0, 0
        self.identity: Mapping[str, str] = {"name": Path(checkpoint).name, "version": "1"}

    def reset(self, episode: str, task: str, seed: int | None = None) -> None:  # noqa: ARG002
        """Start an episode; without a seed it is seed 0."""
        self._seed, self._seq = seed or 0, 0

    def infer(self, observation: Observation, prompt: str, *, deadline_s: float | None = None) -> Chunk:  # noqa: ARG002
        """The chunk that follows `observation`; deadlines are not kept."""
        from recap_model.observation import prepare_images, prepare_state

        began, config = time.monotonic(), self._policy.config
        robot = self._files.spec.robot
        noise = (
            np.random.default_rng([self._seed, self._seq]).standard_normal(
                (config.chunk, config.padded_action), dtype=np.float32
            )
            * self._noise_scale
        )
        task = self._prompt_text(prompt)
        tokens = self._text(conditioning.prompt(task, self._indicator))
        seen = (
            self._batch(prepare_images(observation.images, robot)),
            self._batch(prepare_state(observation.state, robot)),
        )
        with self._torch.no_grad():
            if self._beta == 1.0:
                actions = self._policy.sample_actions(*seen, *tokens, self._batch(noise))
            else:
                blank = self._text(conditioning.unconditional_prompt(task))
                beta = self._torch.tensor([self._beta])
                actions = self._policy.sample_actions_guided(*seen, *tokens, *blank, beta, self._batch(noise))
        seq, self._seq = self._seq, self._seq + 1
        return Chunk(actions[0].numpy(), seq, observation.t, time.monotonic() - began)

    def outcome(self, success: bool) -> None:
        """Nobody needs it here."""

    def clock_offset(self) -> float:
        """The same clock."""
        return 0.0

    def _text(self, text: str) -> tuple[Any, Any]:
        ids, mask = self._files.tokenizer(text)
        return self._batch(ids), self._batch(mask)

    def _batch(self, array: NDArray[Any]) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array))[None]


def probe(
    checkpoint: Path,
    variants: Sequence[Variant],
    out: Path,
    *,
    tasks: Sequence[str],
    episodes_per_task: int,
    first_seed: int,
    robot: str = "metaworld",
    execute: int = 4,
    noise_scale: float = 1.0,
    workers: int = 2,
    on_result: Callable[[Variant, EpisodeResult], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate every variant and write `<out>/<variant>/evaluation.json`, in the form of `recap evaluate`.

    noise_scale: as of the service, 0 (the flow begins without noise) to 1.
    A variant whose file is there for the same checkpoint and episodes is not run again. Returns name -> its content.
    """
    if not 0.0 <= noise_scale <= 1.0:
        raise ProbeError(f"noise_scale: expected 0 to 1, got {noise_scale}")
    manifest = read_manifest(checkpoint, "policy")
    reports = {}
    for variant in variants:
        request = {
            "checkpoint": manifest.hash, "robot": robot, "tasks": list(tasks), "episodes_per_task": episodes_per_task,
            "first_seed": first_seed, "execute": execute, "noise_scale": noise_scale, **asdict(variant),
        }  # fmt: skip
        path = out / variant.name / NAME
        known = _known(path, request)
        reports[variant.name] = known or _run(checkpoint, variant, path, request, workers, on_result)
    return reports


def _known(path: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    known = {"noise_scale": 1.0, **report.get("request", {})}  # not written before there was a choice
    return report if known == request else None


def _run(
    checkpoint: Path,
    variant: Variant,
    path: Path,
    request: dict[str, Any],
    workers: int,
    on_result: Callable[[Variant, EpisodeResult], None] | None,
) -> dict[str, Any]:
    options = {"checkpoint": str(checkpoint), "prompt": variant.prompt, "beta": variant.beta,
               "noise_scale": request["noise_scale"]}  # fmt: skip
    settings = FleetSettings(
        request["robot"],
        local=("training.probe:CheckpointPolicy", options),
        loop=LoopSettings(execute=request["execute"], realtime=False),
    )
    jobs = jobs_for(request["tasks"], request["episodes_per_task"], request["first_seed"])
    results = run_fleet(
        jobs, settings, workers=workers, on_result=lambda r, _: on_result(variant, r) if on_result else None
    )
    opened = open_robot(request["robot"])
    report = {
        "schema": SCHEMA, "robot": request["robot"], "request": request,
        "policy": {"name": checkpoint.name, "hash": request["checkpoint"], "conditioning": variant.prompt,
                   "beta": variant.beta},
        "realtime": False, "execute": request["execute"],
        **statistics(results, opened.spec.control_hz),
    }  # fmt: skip
    opened.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)
    return report


def compare(report: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[float, float, float]:
    """Throughput of one evaluation over another's with its paired 95 % interval; the same scenes in both."""
    rows, others = report["episodes"], base["episodes"]
    scenes = [[(row["task_name"], row["seed"]) for row in part] for part in (rows, others)]
    if scenes[0] != scenes[1]:
        raise ProbeError("evaluations: expected the same tasks and seeds in the same order in both, got different ones")
    columns = [[float(bool(row["success"])) for row in rows], [row["steps"] for row in rows]]
    columns += [[float(bool(row["success"])) for row in others], [row["steps"] for row in others]]
    return throughput_ratio(*columns, paired=True)
