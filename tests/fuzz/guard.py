"""One input through one decoder, under limits of time and memory."""

import resource
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fuzz.targets import Target

SECONDS = 2.0


class Hang(BaseException):
    """Not an Exception: a decoder's own `except Exception` must not take it for bad input."""


@dataclass(frozen=True)
class Verdict:
    """outcome: "ok", or the kind of error with its message, digits left out; finding: what is wrong, None = nothing."""

    outcome: str
    finding: str | None = None


@contextmanager
def watching() -> Iterator[None]:
    """Inside, a decoder that takes longer than `SECONDS` of processor time is interrupted. Main thread only."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise Hang

    with suppress(OSError):  # else what this process held earlier would hide what an input takes (Linux only)
        Path("/proc/self/clear_refs").write_text("5")
    before = signal.signal(signal.SIGPROF, interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def tried(target: Target, data: bytes) -> Verdict:
    """Run one input inside `watching()`. Processor time, not the clock's: a busy machine is no finding."""
    peak, began = _peak_mib(), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.run(data)
        verdict = Verdict("ok")
    except Hang:
        verdict = Verdict("hang", f"hang: more than {SECONDS} s")
    except BaseException as error:
        verdict = _judged(target, error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    grown, took = _peak_mib() - peak, time.process_time() - began
    if verdict.finding is None and took > SECONDS:  # C code that held the signal back
        return Verdict("hang", f"hang: {took:.1f} s")
    if verdict.finding is None and grown > target.grows:
        return Verdict("memory", f"memory: {grown:.0f} MiB, expected at most {target.grows}")
    return verdict


def _judged(target: Target, error: BaseException) -> Verdict:
    if isinstance(error, KeyboardInterrupt):
        raise error
    outcome = type(error).__name__ + ": " + "".join(c for c in str(error)[:60] if not c.isdigit())
    if target.permits(error):
        return Verdict(outcome)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return Verdict(outcome, f"crash: {type(error).__name__} at {where.name}: {str(error)[:120]}")


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
