"""Which of the waiting requests run next, how many in one run, and when a newcomer would be answered. Pure: no thread
and no clock. Times are seconds of one monotonic clock."""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PATIENCE = 8
"""A request that this many runs have passed over goes before all that have not been, whatever their urgency."""

_SAMPLES = 16
_EVIDENCE = 3
_BELIEVED_S, _BELIEVED_RUNS = 2.0, 10
_RUN_OVERHEAD_S = 0.0005  # what a further run costs around the engine: waking threads, posting answers


@dataclass(slots=True)
class Turn:
    """A waiting request's claim on the engine.

    arrived: when it came, or the first of those that it has replaced. due: when its robot has nothing left to do.
    deadline: when its answer is worth nothing; inf = never. passed: runs that were begun without it.
    """

    arrived: float
    due: float
    deadline: float = math.inf
    passed: int = 0

    @property
    def rank(self) -> tuple[bool, float]:
        """Ascending: who was passed over too often by arrival, then the others by urgency."""
        waited = self.passed >= PATIENCE
        return not waited, self.arrived if waited else self.due


def make_turn(now: float, *, deadline_s: float | None, runs_out_s: float | None, replaced: Turn | None) -> Turn:
    """The claim of a request that comes `now`. deadline_s, runs_out_s: seconds from now, None = not told.

    Due is when the chunk runs out, else the deadline, else the arrival: a robot that tells nothing waits standing.
    What it replaces leaves it its arrival and the runs that passed it over, so a fast sender cannot starve itself.
    """
    arrived, passed = (now, 0) if replaced is None else (replaced.arrived, replaced.passed)
    deadline = math.inf if deadline_s is None else now + deadline_s
    due = arrived if deadline_s is None else deadline
    if runs_out_s is not None:
        due = now + max(runs_out_s, 0.0)
    return Turn(arrived, due, deadline, passed)


class RunTimes:
    """How long a run of so many samples takes at least, from the latest runs.

    Per size the lower quartile of the last 16, so that neither a burst of slow runs nor a lucky one moves it. It is
    believed from the third run on, and for 2 s and ten runs' length after the last: then the next run tries anew.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self._samples: dict[int, deque[float]] = {size: deque(maxlen=_SAMPLES) for size in self.sizes}
        self._until = dict.fromkeys(self.sizes, math.inf)  # how long the samples are believed
        self._known: dict[int, float] = {}  # seconds, of the sizes with evidence
        self._plans: list[tuple[int, ...]] = []  # made when first asked for, after every run anew
        self._planned_until = math.inf

    @property
    def limit(self) -> int:
        """The most samples of one run."""
        return self.sizes[-1]

    def size(self, count: int) -> int:
        """What `count` samples are padded to."""
        return self.sizes[bisect_left(self.sizes, count)]

    def start(self, seconds: Mapping[int, float], now: float) -> None:
        """What a warm-up has measured of each size: believed at once, and no longer than any other run."""
        for size, value in seconds.items():
            for _ in range(_EVIDENCE):
                self.record(size, value, now)

    def record(self, count: int, seconds: float, now: float) -> None:
        """A run of `count` samples that ended `now`."""
        size = self.size(count)
        samples = self._samples[size]
        if now > self._until[size]:
            samples.clear()
            self._known.pop(size, None)
        samples.append(seconds)
        self._until[size] = now + _BELIEVED_S + _BELIEVED_RUNS * seconds
        if len(samples) >= _EVIDENCE:
            self._known[size] = sorted(samples)[len(samples) // 4]
        self._plans = []

    def seconds(self, count: int, now: float) -> float:
        """The least that a run of `count` takes; 0 when nothing is known. Of a size without evidence it is known that
        it takes no less than a smaller one, and no less than its share of a larger one."""
        size = self.size(count)
        if size in self._known and now <= self._until[size]:
            return self._known[size]
        known = ((other, value) for other, value in self._known.items() if now <= self._until[other])
        return max((value * min(size / other, 1.0) for other, value in known), default=0.0)

    def plan(self, count: int, now: float) -> tuple[int, ...]:
        """Split up to `limit` samples into the runs that end the work earliest: 3 as 3 padded to 4, or as 2 and 1.
        Samples of each run, the largest first; as few runs as possible among equals."""
        if count <= self.sizes[0]:
            return (count,)
        if not self._plans or now > self._planned_until:
            self._plans = _plans({size: self.seconds(size, now) for size in self.sizes})
            self._planned_until = min((until for until in self._until.values() if until >= now), default=math.inf)
        return self._plans[count]

    def drain_s(self, count: int, now: float) -> float:
        """Seconds that an idle engine needs at least for `count` waiting samples."""
        full, rest = divmod(count, self.limit)
        runs = full * self._planned_s(self.limit, now) if full else 0.0
        return runs + (self._planned_s(rest, now) if rest else 0.0)

    def _planned_s(self, count: int, now: float) -> float:
        return sum(self.seconds(part, now) for part in self.plan(count, now))


def _plans(seconds: Mapping[int, float]) -> list[tuple[int, ...]]:
    """For every number of samples up to the largest size, the runs that end the work earliest."""
    cost = {size: value + _RUN_OVERHEAD_S for size, value in seconds.items()}
    sizes = sorted(cost, reverse=True)
    best: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())]
    for n in range(1, sizes[0] + 1):
        padded = min(size for size in sizes if size >= n)
        options: list[tuple[float, int, tuple[int, ...]]] = [(cost[padded], 1, (n,))]
        for size in sizes:
            if size < n:
                rest_s, runs, rest = best[n - size]
                options.append((cost[size] + rest_s, runs + 1, (size, *rest)))
        best.append(min(options, key=lambda option: option[:2]))
    return [tuple(sorted(parts, reverse=True)) for _, _, parts in best]


def expected_end(turn: Turn, waiting: Sequence[Turn], times: RunTimes, now: float, free_at: float) -> float:
    """When a newcomer would be answered at the earliest: after the run under way (it ends at `free_at`) and all that
    go before it."""
    rank = turn.rank
    ahead = sum(other.rank <= rank for other in waiting)
    return max(now, free_at) + times.drain_s(ahead + 1, now)


@dataclass(frozen=True)
class Run:
    """The next run. chosen: positions in the list of those that wait, the most urgent first. ends: when it is expected
    to end. refused: positions of those that cannot be answered in time any more, and when they would have been."""

    chosen: tuple[int, ...]
    ends: float
    refused: tuple[tuple[int, float], ...] = ()


def next_run(waiting: Sequence[Turn], times: RunTimes, now: float) -> Run:
    """Form a batch from those that wait, in order of arrival.

    As many as end the work earliest. When all that wait fit into one run and it would be too late for some, a smaller
    run that is in time goes first; when more wait, the throughput counts, and those that are too late give way.
    """
    if len(waiting) == 1 and waiting[0].deadline >= (ends := now + times.seconds(1, now)):
        return Run((0,), ends)  # as the rest would find, sooner
    queue = sorted(range(len(waiting)), key=lambda i: waiting[i].rank)  # stable: equals stay in order of arrival
    refused: list[tuple[int, float]] = []
    while queue:
        count = times.plan(min(len(queue), times.limit), now)[0]
        if len(queue) <= times.limit and _late(queue[:count], waiting, times, now) is not None:
            count = _smaller(queue[:count], waiting, times, now)
        ends = now + times.seconds(count, now)
        late = _late(queue[:count], waiting, times, now)
        if late is None:
            return Run(tuple(queue[:count]), ends, tuple(refused))
        refused.append((late, ends))
        queue.remove(late)
    return Run((), now, tuple(refused))


def _late(chosen: Sequence[int], waiting: Sequence[Turn], times: RunTimes, now: float) -> int | None:
    """The first of `chosen` for which their common run would be too late."""
    ends = now + times.seconds(len(chosen), now)
    return next((i for i in chosen if waiting[i].deadline < ends), None)


def _smaller(chosen: Sequence[int], waiting: Sequence[Turn], times: RunTimes, now: float) -> int:
    """How many of `chosen` fit into a run that is in time for all of them; the smallest size when none is."""
    sizes = [size for size in reversed(times.sizes) if size < len(chosen)]
    in_time = (size for size in sizes if _late(chosen[:size], waiting, times, now) is None)
    return next(in_time, sizes[-1] if sizes else len(chosen))
