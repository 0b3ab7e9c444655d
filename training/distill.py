"""One-step distillation: a student whose single jump from noise lands where a frozen teacher ends after all its steps.

The teacher's guidance is baked in: v = v_u + beta (v_c - v_u), pi*0.6 appendix E. So the student is served as any other
policy: positive prompt, one step, no second branch. Loss for an observation o and noise z, with time 1 = noise:

    jump_weight |v_s(z, 1, o) - (z - a)|^2 + flow_weight |v_s(x_t, t, o) - v(x_t, t, o)|^2,   x_t = t z + (1 - t) a

a is the teacher's Euler solution from z. The first term is what gets served: its error is that of the chunk itself. The
second (SnapFlow's flow-matching term, with the guided teacher in place of data) keeps the rest of the field a flow. Its
t stays one teacher step below 1: at t = 1 the two terms ask two values of one output, the way to the end of the path
and its first direction. A frozen copy teaches: a student that teaches itself loses the guidance (docs/training.md).
"""

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from recap_model import conditioning
from recap_model.checkpoint import CheckpointFiles
from recap_model.guidance import combine
from recap_model.manifest import Manifest, publish, write_manifest
from recap_model.policy import flow
from recap_model.policy.language import KeyValues, prefix_mask
from recap_model.policy.load import load_policy
from recap_model.policy.model import Policy, Prefix, pair
from recap_model.tokenizer import TextTokenizer
from training.checkpoint import write_checkpoint
from training.distributed import once
from training.loader import WHOLE, Batch, FrameTable, Loader, Part, Sampler, split_episodes
from training.loop import autocast_vision, fit, forget_state, pick_device, placer
from training.settings import FitSettings, Precision
from training.table import load_table, prompted

MODE = "distilled"
_MEASURED = 512  # held-out frames that the student is compared with its teacher on, evenly spread
_AT_ONCE = 32


class DistillError(ValueError):
    """A teacher, or a setting, from which no one-step student can be made."""


@dataclass(frozen=True)
class DistillSettings:
    """beta: the teacher's guidance, 1 = none. teacher_steps: its Euler steps, None = those it is served with.

    train: "expert" trains the action expert alone and shares the encoded observation with the teacher; "all" trains
    the whole network on its own encoding. draws: noise draws per encoded observation. shift: image augmentation [px],
    the same for both. held_out: share of episodes kept for the comparison.
    """

    fit: FitSettings
    beta: float = 1.0
    teacher_steps: int | None = None
    train: Literal["expert", "all"] = "expert"
    jump_weight: float = 1.0
    flow_weight: float = 0.2
    draws: int = 2
    shift: int = 2
    held_out: float = 0.1

    def __post_init__(self) -> None:
        checks = {
            "beta": (1 <= self.beta < float("inf"), "at least 1 (1 = no guidance)", self.beta),
            "teacher_steps": (
                self.teacher_steps is None or self.teacher_steps >= 2,
                "2 or more Euler steps",
                self.teacher_steps,
            ),
            "jump_weight": (0 < self.jump_weight < float("inf"), "a positive weight", self.jump_weight),
            "flow_weight": (0 <= self.flow_weight < float("inf"), "a weight of 0 or more", self.flow_weight),
            "draws": (self.draws >= 1, "1 or more", self.draws),
            "held_out": (0 < self.held_out < 1, "a share between 0 and 1", self.held_out),
        }
        for name, (good, expected, got) in checks.items():
            if not good:
                raise DistillError(f"{name}: expected {expected}, got {got}")


@dataclass(frozen=True)
class Lesson:
    """A batch with positive prompts, and the same prompts without the clause: tokens int32, mask bool, [B, L]."""

    batch: Batch
    bare_tokens: NDArray[np.int32]
    bare_mask: NDArray[np.bool_]


class Lessons:
    """Rows of a table -> lessons. The indicators of the table are not read: the student is always told `positive`."""

    def __init__(self, table: FrameTable, tokenizer: TextTokenizer, *, chunk: int, shift: int, seed: int) -> None:
        self.table = replace(table, indicator=np.full(len(table), conditioning.POSITIVE, np.int8))
        self.loader = Loader(self.table, tokenizer, chunk=chunk, dropout=0.0, shift=shift, seed=seed)
        bare = [tokenizer(conditioning.unconditional_prompt(task)) for task in table.tasks]
        self.tokens, self.masks = np.stack([ids for ids, _ in bare]), np.stack([mask for _, mask in bare])

    def __call__(self, rows: NDArray[np.int64], step: int, *, train: bool = True, part: Part = WHOLE) -> Lesson:
        """The lesson of `part` of the rows of a step. train=False: no shift."""
        batch = self.loader(rows, step, train=train, part=part)
        task = self.table.task[rows[batch.rows]]
        return Lesson(batch, self.tokens[task], self.masks[task])


@dataclass(frozen=True)
class Reading:
    """What the language layers made of observations: their keys and values, rows [positive] or [positive, bare].

    count: observations; pad: bool [rows, P], True where real.
    """

    cache: KeyValues
    pad: Tensor
    count: int

    def positive(self) -> "Reading":
        """The rows with the positive prompt."""
        n = self.count
        return Reading([(k[:n], v[:n]) for k, v in self.cache], self.pad[:n], n)

    def prefix(self, policy: Policy) -> Prefix:
        """As `policy`'s expert reads it."""
        return Prefix(policy.expert.prefix_keys(self.cache), self.pad)


@dataclass(frozen=True)
class Teacher:
    """A frozen policy under guidance `beta`, integrated in `steps` Euler steps. precision: of its image tower."""

    policy: Policy
    beta: float
    steps: int
    precision: Precision = "fp32"

    @torch.no_grad()
    def read(self, lesson: Lesson) -> Reading:
        """Encode a lesson: the images once, both prompts as one batch; only the positive one where beta is 1."""
        put, batch = placer(self.policy), lesson.batch
        with autocast_vision(self.policy, self.precision):
            seen = self.policy.see(put(batch.images))
        parts = [seen.float(), put(batch.state), put(batch.tokens), put(batch.token_mask)]
        if self.beta != 1:
            others = [*parts[:2], put(lesson.bare_tokens), put(lesson.bare_mask)]
            parts = [pair(a, b) for a, b in zip(parts, others, strict=True)]
        x, pad = self.policy.embed_prefix(*parts)
        _, cache = self.policy.language(x, *prefix_mask(pad), stop=self.policy.expert.depth)
        return Reading(cache, pad, len(batch.state))

    @torch.no_grad()
    def velocity(self, x: Tensor, time: Tensor, prefix: Prefix) -> Tensor:
        """Guided velocity at x [B, T, padded], time [B]; prefix of a whole reading: [B] or [2B] rows."""
        if self.beta == 1:
            return self.policy.velocity(x, time, prefix)
        both = self.policy.velocity(pair(x, x), pair(time, time), prefix)
        conditional, unconditional = both.unflatten(0, (2, -1)).unbind(0)
        return combine(conditional, unconditional, self.beta)

    @torch.no_grad()
    def solve(self, noise: Tensor, prefix: Prefix) -> Tensor:
        """Normalised actions [B, T, padded] that the guided flow carries `noise` to."""
        return flow.integrate(lambda x, t: self.velocity(x, torch.full_like(x[:, 0, 0], t), prefix), noise, self.steps)


def make_student(teacher: Policy, train: Literal["expert", "all"]) -> Policy:
    """A one-step copy of `teacher`, which is frozen here. With "expert" the frozen parts are the teacher's own objects:
    held in memory once, and what the teacher reads of an observation is what the student reads."""
    shared = (teacher.vision, teacher.language, teacher.state_in) if train == "expert" else ()
    student = copy.deepcopy(teacher, {id(part): part for part in shared})
    student.config = replace(teacher.config, denoise_steps=1, max_delay=0)  # its lessons give no actions
    teacher.requires_grad_(False)
    return student


def distill_loss(
    student: Policy, teacher: Teacher, lesson: Lesson, settings: DistillSettings, generator: torch.Generator
) -> Tensor:
    """The loss at the head of this module, the mean over all actions of the chunk, times the batch's share of its step.
    Actions of the data are not read."""
    draws, config, batch = settings.draws, student.config, lesson.batch
    reading = teacher.read(lesson)
    theirs = reading.prefix(teacher.policy).repeat(draws)
    # drawn for the whole step and on the CPU: the same seed is the same run on any device and however it is divided
    noise = torch.randn(batch.total * draws, config.chunk, config.padded_action, generator=generator)
    time = flow.sample_time(len(noise), generator) * (1 - 1 / teacher.steps)
    own_rows = slice(batch.rows.start * draws, batch.rows.stop * draws)
    noise, time = noise[own_rows].to(reading.pad.device), time[own_rows].to(reading.pad.device)
    solution = teacher.solve(noise, theirs)
    ours = _student_prefix(student, reading, lesson, settings).repeat(draws)
    own = slice(config.action_dim)  # what pads the action to the model's width is nothing to learn
    jump = student.velocity(noise, torch.ones_like(time), ours) - (noise - solution)
    loss = settings.jump_weight * jump[..., own].square().mean()
    if settings.flow_weight:
        x, _ = flow.interpolate(solution, noise, time)
        off = student.velocity(x, time, ours) - teacher.velocity(x, time, theirs)
        loss = loss + settings.flow_weight * off[..., own].square().mean()
    return loss * batch.share()


def _student_prefix(student: Policy, reading: Reading, lesson: Lesson, settings: DistillSettings) -> Prefix:
    if settings.train == "expert":
        return reading.positive().prefix(student)
    put, batch = placer(student), lesson.batch
    with autocast_vision(student, settings.fit.precision):
        seen = student.see(put(batch.images))
    return student.read(seen.float(), put(batch.state), put(batch.tokens), put(batch.token_mask))


def distill(settings: DistillSettings, teacher: Path, dataset: Path, out: Path) -> Manifest:
    """Distil the policy checkpoint `teacher` on the frames of `dataset` and publish the student at `out`.

    Only observations and tasks of the dataset are read. Raises DistillError, ManifestError (no policy), SpecError (data
    of another robot), ResumeError.
    """
    if out.resolve() == teacher.resolve():
        raise DistillError(f"--out: expected another folder than the teacher's, got {out}; it would be replaced")
    policy, files = load_policy(teacher)
    settings = _resolved(settings, policy, files)
    source = load_table(dataset)
    spec = replace(files.spec, robot=source.known_robot(files, teacher))
    policy = policy.to(device=pick_device(settings.fit.device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    student = make_student(policy, settings.train).train()
    steps = settings.teacher_steps or policy.config.denoise_steps
    guide = Teacher(policy, settings.beta, steps, settings.fit.precision)
    seed, table = settings.fit.seed, source.table
    lessons = Lessons(
        prompted(table, files.spec), files.tokenizer, chunk=policy.config.chunk, shift=settings.shift, seed=seed
    )
    used, held = (np.flatnonzero(np.isin(table.episode, [*part])) for part in
                  split_episodes(table.episode, settings.held_out, seed))  # fmt: skip
    sampler = Sampler(used, settings.fit.rows_per_step, seed)
    parents = {"dataset": source.hash, "teacher": files.manifest.hash}
    work = out.with_name(out.name + ".work")
    average = fit(
        student,
        lambda step, generator, part: distill_loss(
            student, guide, lessons(sampler(step), step, part=part), settings, generator
        ),
        settings.fit,
        work,
        what="distillation",
        identity={"mode": MODE, "parents": parents, "settings": asdict(settings)},
        parts=True,
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(average.shadow[name])

    def finish() -> Manifest:
        # one episode leaves nothing to hold out: the numbers are then of the training frames; held_out_frames says 0
        rows = held if len(held) else used
        served = replace(guide, precision="fp32")
        metrics = {
            "frames": len(used),
            "held_out_frames": len(held),
            "epochs": settings.fit.steps * settings.fit.rows_per_step / len(used),
            **compare(student, served, lessons, rows, files),
        }
        return _publish(out, work, student, replace(files, spec=spec), parents, settings, metrics)

    return once(out, finish, pick_device(settings.fit.device))


def compare(
    student: Policy, teacher: Teacher, lessons: Lessons, rows: NDArray[np.int64], files: CheckpointFiles
) -> dict[str, Any]:
    """How far the student's chunks are from the guided teacher's on `rows`, for the same noise (seeded).

    mean_abs, max_abs: absolute difference in standard deviations of the action, over all and by dimension; cosine: of
    all normalised chunks as one vector. one_step_*: the same of the teacher itself served in one step without guidance,
    which is what distillation starts from.
    """
    student.eval()
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MEASURED)).astype(np.int64))]
    generator = torch.Generator().manual_seed(0)
    chunks = [
        _chunks(student, teacher, lessons(rows[i : i + _AT_ONCE], 0, train=False), generator)
        for i in track(range(0, len(rows), _AT_ONCE), "comparing", disable=len(rows) < _MEASURED)
    ]
    action = files.stats["action"]
    scale = np.where(action.std > 1e-8, action.std, 1.0)
    ours, theirs, before = ((np.concatenate(part) - action.mean) / scale for part in zip(*chunks, strict=True))
    off = np.abs(ours - theirs).reshape(-1, len(scale))
    names = [dim.name for dim in files.spec.robot.action]
    return {
        **_distance(ours, theirs),
        "mean_abs_by_dimension": dict(zip(names, off.mean(0).tolist(), strict=True)),
        "max_abs_by_dimension": dict(zip(names, off.max(0).tolist(), strict=True)),
        **{f"one_step_{key}": value for key, value in _distance(before, theirs).items()},
    }


@torch.no_grad()
def _chunks(
    student: Policy, teacher: Teacher, lesson: Lesson, generator: torch.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Chunks [B, T, A] in physical units: the student's as served, the guided teacher's, the teacher's in one step."""
    put, batch, config = placer(student), lesson.batch, student.config
    noise = torch.randn(len(batch.state), config.chunk, config.padded_action, generator=generator)
    noise = noise.to(next(student.parameters()).device)
    ours = student.sample_actions(put(batch.images), put(batch.state), put(batch.tokens), put(batch.token_mask), noise)
    reading = teacher.read(lesson)
    theirs = teacher.solve(noise, reading.prefix(teacher.policy))
    plain = reading.positive().prefix(teacher.policy)
    before = noise - teacher.policy.velocity(noise, torch.ones_like(noise[:, 0, 0]), plain)
    physical = student.scaling.physical
    return ours.cpu().numpy(), physical(theirs).cpu().numpy(), physical(before).cpu().numpy()


def _distance(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> dict[str, float]:
    off = np.abs(ours - theirs)
    norm = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    cosine = float(ours.ravel() @ theirs.ravel()) / max(norm, 1e-30)
    return {"mean_abs": float(off.mean()), "max_abs": float(off.max()), "cosine": cosine}


def _resolved(settings: DistillSettings, policy: Policy, files: CheckpointFiles) -> DistillSettings:
    """`settings` with the teacher's own number of steps. Refuses teachers that there is nothing to learn from."""
    if policy.config.denoise_steps < 2:
        raise DistillError(
            f"{files.path}: expected a teacher of several denoising steps, got {policy.config.denoise_steps}: it is a "
            "one-step policy already; give the checkpoint that it was distilled from"
        )
    if settings.beta > 1 and files.manifest.parameters.get("dropout") == 0:
        raise DistillError(
            f"beta: expected 1 for {files.path}, which was trained with --dropout 0 and never read a prompt without "
            f"the clause, got {settings.beta}; train the teacher with dropout"
        )
    return replace(settings, teacher_steps=settings.teacher_steps or policy.config.denoise_steps)


def _publish(
    out: Path,
    work: Path,
    student: Policy,
    files: CheckpointFiles,
    parents: dict[str, str],
    settings: DistillSettings,
    metrics: dict[str, Any],
) -> Manifest:
    vlm = files.manifest.parameters.get("vlm_name")  # what an export to LeRobot needs to know
    parameters = {"mode": MODE, "teacher": parents["teacher"], **asdict(settings), **({"vlm_name": vlm} if vlm else {})}
    weights = {name: parameter.detach() for name, parameter in student.named_parameters()}
    with publish(out) as folder:
        write_checkpoint(folder, weights, student.config.to_json(), files.spec, files.tokenizer, files.stats)
        (folder / "metrics.jsonl").write_text((work / "metrics.jsonl").read_text())
        manifest = write_manifest(folder, "policy", parents=parents, parameters=parameters, metrics=metrics)
    forget_state(work)
    return manifest
