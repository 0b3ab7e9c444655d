"""Rows as a dated table."""

from datetime import UTC, datetime
from typing import Any

from benchmarks.serve.peers import PEERS
from recap_model.manifest import source_commit

Row = dict[str, Any]

_HOW = """One robot that asks again as soon as it is answered (p50, p95, p99, CPU of the server's process tree, all in
ms a request), and robots on a clock of their own, as many as get 99 of 100 replies within one period (`held`). The
clock runs from the encoded request being sent to the reply being here: a robot's own encoding is the same for all.
Load and server are two processes on the same cores; each server runs alone, in turns. `recap-null` is the policy
service with an engine that returns zeros, `recap-tiny` with the shipped model on thinned-out frames, `echo` the least
that an openpi server does (websockets, msgpack, constant actions; with the C library's defaults for its memory, which
our service changes). Payloads: 14 numbers and a prompt (`state`, with one frame of 8 x 8), two or three frames, raw or
JPEG of quality 90; the reply is 50 actions of 14 numbers.
"""


def table(rows: list[Row], added: Row | None, hardware: str, busy: float, rates: tuple[int, ...]) -> str:
    """Markdown. rows: as `plan` makes them."""
    parts = [f"## {datetime.now(UTC):%Y-%m-%d}, servers side by side, {hardware}", ""]
    parts += [
        f"`recap bench serve`, commit {source_commit()[:10]}; {busy:.0%} of the machine was busy before the run.",
        "",
    ]
    if added is not None:
        parts += [_added(added), ""]
    parts += [_HOW]
    head = ["server", "payload", "p50 ms", "p95", "p99", "CPU ms", *(f"held at {hz} Hz" for hz in sorted(rates))]
    parts += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    parts += [_line(row, rows, sorted(rates), len(head)) for row in rows if row["hz"] is None]
    names = dict.fromkeys(row["server"] for row in rows)
    notes = [f"- `{name}`: {PEERS[name].note}." for name in names if name in PEERS]
    return "\n".join([*parts, "", *notes]).rstrip() + "\n"


def _added(added: Row) -> str:
    return (
        f"Time added to the model ({added['payload']}, both servers up, {added['requests']} requests each in turns): "
        f"p50 {added['p50_ms']:.3f} ms, p99 {added['p99_ms']:.3f} ms; the echo server {added['echo_p50_ms']:.3f} and "
        f"{added['echo_p99_ms']:.3f}; ratio {added['ratio_p50']:.2f} and {added['ratio_p99']:.2f}."
    )


def _line(row: Row, rows: list[Row], rates: list[int], width: int) -> str:
    what = f"| {row['server']} | {row['payload']} |"
    if "not_measured" in row:
        return f"{what} not measured: {row['not_measured'].replace('|', '/')} |" + " |" * (width - 3)
    same = [other for other in rows if (other["server"], other["payload"]) == (row["server"], row["payload"])]
    held = {other["hz"]: other["robots"] for other in same if other["hz"] is not None}
    return (
        f"{what} {row['p50_ms']:.3f} | {row['p95_ms']:.3f} | {row['p99_ms']:.3f} | "
        f"{1000 * row['cpu_s_per_request']:.3f} |" + "".join(f" {held.get(hz, '')} |" for hz in rates)
    )
