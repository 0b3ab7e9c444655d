"""How many robots a server holds: double, then bisect."""

from collections.abc import Callable


def most(holds: Callable[[int], bool], *, start: int, limit: int) -> int:
    """The largest count in 0..limit that `holds`, to an eighth of itself; monotone where it can be.

    start: where to try first (what a guess makes of it decides only how long this takes).
    """
    good, bad = 0, limit + 1
    count = min(max(start, 1), limit)
    while bad - good > max(1, good // 8):
        if holds(count):
            good = count
            count = min(2 * count, limit) if bad > limit else (good + bad) // 2
        else:
            bad = count
            count = max(count // 2, 1) if good == 0 else (good + bad) // 2
        if good == limit:
            break
    return good
