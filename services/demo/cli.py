"""`recap demo`: both services, a simulated arm at control rate, live values, a report, a video and one line of JSON."""

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from recap_client.record import read_rollout
from recap_client.robots.metaworld import TASKS, metaworld_spec
from recap_client.runtime import EpisodeResult
from recap_model.manifest import Manifest, read_manifest
from recap_model.spec import read_spec
from services.demo import drive
from services.demo.children import DemoError, serving
from services.demo.drive import ROBOT, Failure, Job
from services.demo.live import Progress
from services.demo.summary import Episode, Summary, summarise, write_json
from services.demo.values import ValueFollower

MODELS = Path(__file__).resolve().parents[2] / "assets" / "model_repository"
_SEED = 300_000  # of the first episode: collection and evaluation use others
_SETTLE_S = 1.0  # how long the last value of an episode may take to arrive


@dataclass(frozen=True)
class DemoArgs:
    """Serve the shipped models, drive a simulated arm with them over the websocket, leave a report and a video."""

    models: Path = MODELS
    """Model repository with a policy and a critic."""
    out: Path = Path("runs/demo")
    """Folder for report.html, video.mp4, demo.json and rollouts/*.mcap; an earlier demo in it is replaced."""
    episodes: int = 36
    tasks: tuple[str, ...] = ()
    """Task names; default: all that the model was trained on."""
    drills: int = 6
    """Extra episodes at the end with scrambled motors: failures for the critic to recognise."""
    beta: float = 1.75
    """Guidance strength; above 1 the repository must hold policy_guided."""
    execute: int = 2
    """Actions of a chunk that are carried out before the next is asked for."""


def main(argv: list[str]) -> int:
    """Run the demo; the last line on stdout is the summary as JSON. Raises DemoError when it cannot run."""
    args = tyro.cli(DemoArgs, args=argv, prog="recap demo", description=DemoArgs.__doc__)
    from services.demo import pages  # after --help: it imports matplotlib

    console = Console()
    jobs = plan(args)
    _clear(args.out)
    signal.signal(signal.SIGTERM, _interrupt)
    episodes: list[Episode] = []
    began = time.monotonic()
    try:
        for episode in run(args, jobs, console):
            episodes.append(episode)
    finally:
        summary = _keep(args, episodes, complete=len(episodes) == len(jobs))
    console.print(f"writing the report and the video ({time.monotonic() - began:.0f} s so far)")
    control_hz = metaworld_spec().control_hz
    pages.write_video(args.out / "video.mp4", episodes, control_hz=control_hz)
    pages.write_report(
        args.out / "report.html",
        summary,
        episodes,
        control_hz=control_hz,
        models=_hashes(args),
        mp4=args.out / "video.mp4",
    )
    _print_result(console, args, summary, episodes)
    print(summary.line(), flush=True)
    return 0


def plan(args: DemoArgs) -> list[Job]:
    """Which episodes to drive, tasks in turn. Raises DemoError when the models are missing or know no such task."""
    for name in ("policy" if args.beta == 1 else "policy_guided", "critic"):
        if not (args.models / name).is_dir():
            raise DemoError(
                f"{args.models}: expected a model repository with {name!r}, got none; `make assets` builds it, "
                "`recap export` makes one from your own checkpoints (then --models DIR)"
            )
    known = read_spec(_version(args.models / "policy") / "spec.json").robot.tasks
    names = args.tasks or tuple(name for name, prompt in TASKS.items() if prompt in known)
    if unknown := [name for name in names if name not in TASKS]:
        raise DemoError(f"--tasks: expected some of {', '.join(TASKS)}; got {', '.join(unknown)}")
    if not names or args.episodes < 1:
        raise DemoError(f"expected at least one episode of a task known to the policy ({', '.join(known)}), got none")
    jobs = [Job(names[i % len(names)], _SEED + i) for i in range(args.episodes)]
    return jobs + [Job(names[i % len(names)], _SEED + i, drill=True) for i in range(args.drills)]


def run(args: DemoArgs, jobs: Sequence[Job], console: Console) -> Iterator[Episode]:
    """Start the services and the robot, yield every episode as it ends; everything is stopped at the end."""
    with contextlib.ExitStack() as stack:
        with console.status("starting the services"):
            at = stack.enter_context(serving(args.models, beta=args.beta, log=args.out / "services.log"))
        follower = ValueFollower(at.critic)
        stack.callback(follower.close)
        follower.connected.wait(5)
        process, receiver = drive.start(at.policy, jobs, args.out / "rollouts", execute=args.execute)
        stack.callback(process.join, 15)
        stack.callback(process.terminate)
        period_ms = 1e3 / metaworld_spec().control_hz
        with Progress(console, jobs, period_ms, at.critic + "/") as progress:
            done = 0
            for job, result in zip(jobs, _results(receiver, progress, follower), strict=False):
                progress.finished(result)
                done += 1
                try:
                    episode = _episode(job, result, follower)
                except KeyboardInterrupt:  # the robot is done with this one: it counts
                    yield _episode(job, result, follower, settle_s=0.0)
                    raise
                yield episode
            if done < len(jobs):
                process.join(5)
                raise DemoError(
                    f"the robot process ended (exit code {process.exitcode}) after {done} of {len(jobs)} episodes; "
                    f"what it recorded is in {args.out / 'rollouts'}"
                )


def _results(receiver: Connection, progress: Progress, follower: ValueFollower) -> Iterator[EpisodeResult]:
    while True:
        if not receiver.poll(0.1):
            newest = follower.latest(ROBOT)
            progress.update(newest, follower.history(str(newest.get("episode"))))
            continue
        try:
            message: EpisodeResult | Failure = receiver.recv()
        except EOFError:
            return
        if isinstance(message, Failure):
            raise DemoError(f"the robot stopped: {message.message}")
        yield message


def _episode(job: Job, result: EpisodeResult, follower: ValueFollower, settle_s: float = _SETTLE_S) -> Episode:
    """Join what the robot and the critic say about an episode, once the critic has heard how it ended or `settle_s`
    have passed."""
    limit = time.monotonic() + settle_s
    while follower.latest(ROBOT).get("episode") == result.episode and time.monotonic() < limit:
        if follower.latest(ROBOT).get("success") is not None:
            break
        time.sleep(0.02)
    span = 0.0
    if result.recording and Path(result.recording).exists():
        times = read_rollout(Path(result.recording), images=False).t
        span = float(times[-1] - times[0]) if len(times) > 1 else 0.0
    values = tuple(follower.history(result.episode))
    return Episode(result, job.drill, span, values, follower.alarmed(result.episode))


def _keep(args: DemoArgs, episodes: Sequence[Episode], *, complete: bool) -> Summary:
    """demo.json, also when the demo was interrupted."""
    summary = summarise(episodes)
    settings: dict[str, Any] = {
        key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(
        args.out / "demo.json", summary, episodes, {**settings, "complete": complete, "models_hash": _hashes(args)}
    )
    return summary


def _print_result(console: Console, args: DemoArgs, summary: Summary, episodes: Sequence[Episode]) -> None:
    steps = sum(item.result.steps for item in episodes if not item.drill)
    share = summary.deadline_misses / max(1, steps)
    good = sum(item.success for item in episodes if not item.drill)
    console.print(
        f"{good} of {summary.episodes} episodes succeeded; {share:.2%} of {steps} control steps were late; "
        f"a chunk took {summary.act_p50_ms:.1f} ms (p99 {summary.act_p99_ms:.1f} ms)",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for name, what in (("report.html", "open it in a browser"), ("video.mp4", "the episodes in real time"),
                       ("rollouts", "MCAP: open in Foxglove, or `recap ingest` them")):  # fmt: skip
        console.print(f"  {args.out / name}  ({what})", highlight=False, soft_wrap=True)


def _hashes(args: DemoArgs) -> dict[str, str]:
    served = ("policy" if args.beta == 1 else "policy_guided", "critic")
    return {name: _manifest(args.models / name).hash for name in served}


def _manifest(model: Path) -> Manifest:
    return read_manifest(_version(model))


def _version(model: Path) -> Path:
    versions = sorted((path for path in model.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    if not versions:
        raise DemoError(f"{model}: expected a version folder such as 1, got none; `make assets` builds it")
    return versions[-1]


def _clear(out: Path) -> None:
    """Remove what an earlier demo left, and nothing else."""
    for path in [*out.glob("rollouts/*.mcap"), *out.glob("rollouts/*.mcap.part")]:
        path.unlink()
    for name in ("report.html", "video.mp4", "demo.json", "services.log"):
        (out / name).unlink(missing_ok=True)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
