"""The long fuzzing: `PYTHONPATH=tests python -m fuzz.run --inputs 1000000` (`make fuzz`).

Mutations from a seed, shared out over all targets; an input whose outcome is new joins the pool. With atheris installed
(it is not among our requirements: `uv pip install --target FOLDER atheris`, PYTHONPATH=tests:FOLDER), `--atheris` lets
libFuzzer search by coverage instead. Findings go to `--findings`, a file each; the exit code is 1 when there are any,
and the last line is JSON.
"""

import argparse
import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

POOL = 400
_WEIGHTS = {"rollout": 0.2, "png": 0.5, "jpeg": 0.5}  # slow ones get fewer inputs
_STUCK_S = 120


@dataclass
class Tally:
    """Of one target. findings: what was wrong -> the shortest input that shows it."""

    inputs: int = 0
    good: int = 0
    outcomes: set[str] = field(default_factory=set)
    findings: dict[str, bytes] = field(default_factory=dict)
    slowest_ms: float = 0.0

    def note(self, what: str, data: bytes) -> None:
        if what not in self.findings or len(data) < len(self.findings[what]):
            self.findings[what] = data


def fuzz(target: Any, start: Sequence[bytes], inputs: int, seed: int) -> Iterable[Tally]:
    """Run `inputs` mutations through a target; yields its tally now and then, at last when done."""
    from fuzz.guard import tried, watching
    from fuzz.mutate import mutated

    chance = random.Random(f"{seed} {target.name}")
    pool, tally = list(start), Tally()
    with watching():
        for number in range(inputs):
            if number % 500 == 0:
                signal.setitimer(signal.ITIMER_VIRTUAL, _STUCK_S)  # ends the process: C code that never returns
                yield tally
            data = mutated(target.form, pool, chance, len(start))
            began = time.perf_counter()
            verdict = tried(target, data)
            tally.slowest_ms = max(tally.slowest_ms, 1000 * (time.perf_counter() - began))
            tally.inputs += 1
            tally.good += verdict.outcome == "ok"
            if verdict.finding is not None:
                tally.note(verdict.finding, data)
            elif verdict.outcome not in tally.outcomes and len(pool) < POOL:
                tally.outcomes.add(verdict.outcome)
                pool.append(data)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
    yield tally


def shares(inputs: int, names: Sequence[str]) -> dict[str, int]:
    """How many of `inputs` each target gets; they add up to at least that many."""
    total = sum(_WEIGHTS.get(name, 1.0) for name in names)
    return {name: int(-(-inputs * _WEIGHTS.get(name, 1.0) // total)) for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz, print a table and the JSON line."""
    args = _parser().parse_args(argv)
    if args.child:
        return _atheris_child(args.child, args.inputs, args.seed, args.findings)
    from fuzz.targets import TARGETS

    names = args.targets or list(TARGETS)
    if args.atheris:
        return _atheris(names, args)
    return _mutational(names, args)


def _mutational(names: Sequence[str], args: argparse.Namespace) -> int:
    from fuzz.seeds import corpus
    from fuzz.targets import TARGETS

    rows = []
    began = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("fuzzing", total=args.inputs)
        done = 0
        for name, share in shares(args.inputs, names).items():
            progress.update(task, description=name)
            tally = Tally()
            for tally in fuzz(TARGETS[name], corpus(name), share, args.seed):
                progress.update(task, completed=done + tally.inputs)
            done += tally.inputs
            rows.append(_row(name, tally))
            _save(args.findings, name, tally.findings)
            print(_line(rows[-1]), file=sys.stderr, flush=True)
    return _report("mutations", rows, time.monotonic() - began)


def _row(name: str, tally: Tally) -> dict[str, Any]:
    return {"target": name, "inputs": tally.inputs, "decoded": tally.good, "outcomes": len(tally.outcomes),
            "slowest_ms": round(tally.slowest_ms, 1), "findings": sorted(tally.findings)}  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    found = f"{len(row['findings'])} FINDINGS: {row['findings'][:3]}" if row["findings"] else "nothing found"
    return (f"{row['target']:20} {row['inputs']:8} inputs, {row['decoded']:7} decoded, {row['outcomes']:4} outcomes, "
            f"slowest {row['slowest_ms']:.0f} ms: {found}")  # fmt: skip


def _save(folder: Path, name: str, findings: dict[str, bytes]) -> None:
    for what, data in findings.items():
        path = folder / name / f"found-{hashlib.sha256(data).hexdigest()[:8]}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(what + "\n")


def _report(engine: str, rows: list[dict[str, Any]], seconds: float) -> int:
    found = sum(len(row["findings"]) for row in rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"engine": engine, "inputs": sum(row["inputs"] for row in rows), "seconds": round(seconds),
                      "peak_mib": peak, "findings": found, "rows": rows}))  # fmt: skip
    return 1 if found else 0


def _atheris(names: Sequence[str], args: argparse.Namespace) -> int:
    """A process for each target, for libFuzzer ends the one it runs in."""
    rows = []
    began = time.monotonic()
    for name, share in shares(args.inputs, names).items():
        command = [sys.executable, "-m", __spec__.name, "--child", name, "--inputs", str(share)]
        command += ["--seed", str(args.seed), "--findings", str(args.findings)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        text = done.stderr.splitlines()
        runs = next((int(line.split()[1]) for line in reversed(text) if line.startswith("Done ")), 0)
        found = [] if done.returncode == 0 and runs else ["; ".join(text[-3:])[-300:]]
        rows.append({"target": name, "inputs": runs, "decoded": 0, "outcomes": 0, "slowest_ms": 0.0, "findings": found})
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    return _report("atheris", rows, time.monotonic() - began)


def _atheris_child(name: str, inputs: int, seed: int, folder: Path) -> int:
    try:
        import atheris
    except ImportError:
        print("atheris: not installed; `uv pip install --target FOLDER atheris`, then PYTHONPATH=tests:FOLDER",
              file=sys.stderr)  # fmt: skip
        return 2
    with atheris.instrument_imports(include=["recap_client", "recap_model", "services", "msgpack", "mcap"]):
        from fuzz.targets import TARGETS
    from fuzz.seeds import CORPUS

    target = TARGETS[name]

    def one(data: bytes) -> None:
        try:
            target.run(data)
        except Exception as error:
            if not target.permits(error):
                raise

    found = folder / name
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-runs={inputs}", f"-seed={seed + 1}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=65536",
               "-print_final_stats=0", f"-artifact_prefix={found}/"]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / name)], one)
    atheris.Fuzz()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fuzz.run", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", default=[], help="default: all")
    parser.add_argument("--atheris", action="store_true", help="search by coverage")
    parser.add_argument("--findings", type=Path, default=Path("outputs/fuzz"))
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
