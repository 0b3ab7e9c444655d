"""`recap distill` and `recap distill gate`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from recap_model.manifest import Manifest
from training import presets
from training.cli import Overrides


class GateError(ValueError):
    """Two evaluations that say nothing about each other."""


@dataclass(frozen=True)
class Distill:
    """Policy checkpoint -> one-step policy with guidance baked in. Run the same command again after an interruption: it
    resumes. Judge the student in closed loop afterwards: `recap distill gate`."""

    teacher: tyro.conf.Positional[Path]
    """Policy checkpoint to distil; stays as it is."""
    dataset: Path
    """Any LeRobot dataset of the same robot. Only its observations and tasks are read: failures are welcome."""
    out: Path
    """Checkpoint folder to publish."""
    beta: float = 1.0
    """Guidance of the teacher that the student takes over; 1 = none."""
    teacher_steps: int | None = None
    """Denoising steps of the teacher. Default: those that it is served with."""
    train: Literal["expert", "all"] = "expert"
    """What gets gradients: the action expert alone (the encoded observation is shared with the teacher), or everything
    (slower: the student encodes it again, and learns through it)."""
    jump_weight: float = 1.0
    """Weight of the one jump from noise to the teacher's solution."""
    flow_weight: float = 0.2
    """Weight of the teacher's velocity at times in between; 0 leaves it out."""
    draws: int = 2
    """Noise draws per encoded observation."""
    shift: int = 2
    """Image augmentation in px."""
    held_out: float = 0.1
    """Share of episodes that are kept for comparing student and teacher."""
    overrides: tyro.conf.OmitArgPrefixes[Overrides] = field(default_factory=Overrides)


@dataclass(frozen=True)
class Gate:
    """Compare two evaluations of `recap evaluate` on the same tasks and seeds. Exit code 1 when success drops by more
    than the margin."""

    teacher: tyro.conf.Positional[Path]
    """evaluation.json of the teacher (or its folder), served with the guidance that was baked in."""
    student: tyro.conf.Positional[Path]
    """evaluation.json of the student (or its folder)."""
    margin: float = 3.0
    """Largest accepted drop of the success rate, in points (hundredths)."""


def distill(argv: list[str]) -> int:
    """Distil a policy, publish the student, print how far it is from its teacher."""
    args = tyro.cli(Distill, args=argv, prog="recap distill", description=Distill.__doc__)
    from training.distill import DistillSettings
    from training.distill import distill as run

    # sizes are the teacher's; of the preset only the optimiser's budget counts
    settings = args.overrides.apply(
        DistillSettings(
            presets.load(args.overrides.preset).policy().fit,
            beta=args.beta,
            teacher_steps=args.teacher_steps,
            train=args.train,
            jump_weight=args.jump_weight,
            flow_weight=args.flow_weight,
            draws=args.draws,
            shift=args.shift,
            held_out=args.held_out,
        )
    )
    _report(args.out, run(settings, args.teacher, args.dataset, args.out))
    return 0


def _report(out: Path, manifest: Manifest) -> None:
    got = manifest.metrics
    where = f"{got['held_out_frames']} held-out" if got["held_out_frames"] else "the training"
    print(f"{out}: one-step policy {manifest.hash[:12]}")
    print(f"against the teacher on {where} frames, in standard deviations of the action:")
    print(f"  {'':<16}{'mean':>8}{'max':>8}")
    for name, mean in got["mean_abs_by_dimension"].items():
        print(f"  {name:<16}{mean:>8.3f}{got['max_abs_by_dimension'][name]:>8.3f}")
    print(f"  {'all':<16}{got['mean_abs']:>8.3f}{got['max_abs']:>8.3f}   cosine {got['cosine']:.4f}")
    print(f"  {'before':<16}{got['one_step_mean_abs']:>8.3f}{got['one_step_max_abs']:>8.3f}   "
          f"cosine {got['one_step_cosine']:.4f} (the teacher in one step, unguided)")  # fmt: skip
    print("a small distance is no proof: evaluate both on the same seeds, then `recap distill gate`")


def gate(argv: list[str]) -> int:
    """Success of a student against its teacher, paired by task and seed; 1 when it fell by more than the margin."""
    args = tyro.cli(Gate, args=argv, prog="recap distill gate", description=Gate.__doc__)
    verdict = judge(read_evaluation(args.teacher), read_evaluation(args.student), args.margin)
    low, high = verdict["difference_points_95"]
    print(
        f"{verdict['verdict']}: success {100 * verdict['teacher_success']:.1f} % -> "
        f"{100 * verdict['student_success']:.1f} %, difference {verdict['difference_points']:+.1f} points "
        f"[{low:+.1f}, {high:+.1f}] over {verdict['episodes']} paired episodes; accepted drop {args.margin:g}"
    )
    if not verdict["conclusive"]:
        print("the interval holds the margin: these episodes cannot tell; evaluate both on more seeds")
    print(json.dumps(verdict))
    return 0 if verdict["verdict"] == "PASSED" else 1


Episodes = dict[tuple[str, int], bool]


@dataclass(frozen=True)
class Evaluation:
    """What the gate reads of an evaluation. work: what must be the same for two to be compared; success by episode."""

    where: Path
    work: dict[str, Any]
    policy: dict[str, Any]
    success: Episodes


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation.json, or the one in a folder. Raises GateError for another file or an unknown outcome."""
    from training.evaluate import NAME, SCHEMA

    path = path / NAME if path.is_dir() else path
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise GateError(f"{path}: schema: expected {SCHEMA}, got {data['schema']}")
        rows = [((str(row["task"]), int(row["seed"])), row["success"]) for row in data["episodes"]]
        work = {key: data[key] for key in ("robot", "control_hz", "realtime", "execute")}
        policy = {key: data["policy"].get(key) for key in ("hash", "beta")}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise GateError(
            f"{path}: expected an {NAME} of `recap evaluate`, got a file without it ({type(error).__name__}: {error})"
        ) from error
    unknown = [key for key, success in rows if not isinstance(success, bool)]
    if unknown:
        raise GateError(f"{path}: expected success true or false for every episode, got none for {_some(unknown)}")
    if not rows or len(dict(rows)) != len(rows):
        raise GateError(
            f"{path}: expected every task and seed once, got {len(rows)} episodes, {len(dict(rows))} of them different"
        )
    return Evaluation(path, work, policy, dict(rows))


def judge(teacher: Evaluation, student: Evaluation, margin: float) -> dict[str, Any]:
    """Paired difference of success in points with its 95 % bootstrap interval over episodes, and the verdict.

    conclusive: the interval lies on one side of the margin. Raises GateError when the two are not the same work.
    """
    import numpy as np

    from recap_model.statistics import bootstrap_ratio

    _require_same_work(teacher, student)
    if not 0 <= margin <= 100:
        raise GateError(f"--margin: expected points from 0 to 100, got {margin}")
    keys = sorted(teacher.success)
    theirs, ours = (np.array([e.success[key] for key in keys], np.float64) for e in (teacher, student))
    difference, low, high = (100 * x for x in bootstrap_ratio(ours - theirs, np.ones(len(keys))))
    lost, won = int((theirs > ours).sum()), int((ours > theirs).sum())
    # in whole episodes: a drop of exactly the margin must not fail by rounding
    failed = 100 * (lost - won) > margin * len(keys)
    return {
        "verdict": "FAILED" if failed else "PASSED",
        "episodes": len(keys),
        "teacher_success": float(theirs.mean()),
        "student_success": float(ours.mean()),
        "difference_points": difference,
        "difference_points_95": [low, high],
        "margin_points": margin,
        "only_teacher": lost,
        "only_student": won,
        "conclusive": not low < -margin < high,
    }


def _require_same_work(teacher: Evaluation, student: Evaluation) -> None:
    where = f"{student.where} against {teacher.where}"
    for key, expected in teacher.work.items():
        if student.work[key] != expected:
            raise GateError(f"{where}: {key}: expected {expected!r}, got {student.work[key]!r}; evaluate both alike")
    missing, extra = teacher.success.keys() - student.success.keys(), student.success.keys() - teacher.success.keys()
    if missing or extra:
        raise GateError(
            f"{where}: expected the same tasks and seeds, got {len(missing)} that only the teacher ran "
            f"({_some(sorted(missing))}) and {len(extra)} that only the student ran ({_some(sorted(extra))}); run "
            "`recap evaluate` with the same --tasks, --episodes-per-task and --first-seed"
        )
    if teacher.policy["hash"] is not None and teacher.policy == student.policy:
        raise GateError(f"{where}: expected two models, got the same one twice (hash {teacher.policy['hash'][:12]})")


def _some(keys: list[tuple[str, int]]) -> str:
    shown = ", ".join(f"{task!r} seed {seed}" for task, seed in keys[:3])
    return (shown + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")) or "none"
