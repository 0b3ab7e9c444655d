"""`recap bench serve`: argument parsing, installation, the run, the table; the last line is one JSON object."""

import json
import math
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import tyro

from benchmarks.page import append
from benchmarks.serve.options import OURS, PEER_NAMES, ServeBenchArgs


def main(argv: list[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    args = tyro.cli(ServeBenchArgs, args=argv, prog="recap bench serve", description=ServeBenchArgs.__doc__)
    if args.quick:
        args = replace(args, peers=("none",), payloads=("2x224",), rates=(30,), rounds=1, requests=30, warm_up=5,
                       probe_s=0.5, most_robots=4)  # fmt: skip
    signal.signal(signal.SIGTERM, _interrupt)  # servers are stopped on the way out, whoever asks
    return _run(args)


def _run(args: ServeBenchArgs) -> int:
    from benchmarks.serve import machine
    from benchmarks.serve.plan import Bench, Row, say, unmeasured
    from benchmarks.serve.report import table

    hardware, busy = machine.hardware(), machine.busy()
    if busy > machine.BUSY:
        say(
            f"warning: {busy:.0%} of this machine is busy with other work: latencies and robots held come out "
            "worse than they are; CPU seconds a request stay near the truth"
        )
    servers, missing = _servers(args)
    by_name = {server.name: server for server in servers}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="recap-bench-", ignore_cleanup_errors=True) as folder:
        bench = Bench(args, Path(folder))
        added = bench.added(by_name["recap-null"], by_name["echo"])
        try:
            for row in bench.rows(servers):
                rows.append(row)
        except KeyboardInterrupt:
            print(table(rows, added, hardware, busy, args.rates))  # half an hour's figures are not thrown away
            raise
    rows += [unmeasured(name, payload, why) for name, why in missing.items() for payload in args.payloads]
    text = table(rows, added, hardware, busy, args.rates)
    print(text)
    if args.append is not None:
        append(args.append, text)
    print(json.dumps({"hardware": hardware, "busy": round(busy, 3), "added": added, "rows": _plain(rows)}))
    return 0


def _servers(args: ServeBenchArgs) -> tuple[list[Any], dict[str, str]]:
    """The servers to run, and why others cannot be."""
    from benchmarks.serve.peers import PEERS, PeerMissing, install
    from benchmarks.serve.plan import say
    from benchmarks.serve.servers import Server

    python = Path(sys.executable)
    servers = [Server(name, "openpi", python) for name in OURS]
    servers[-1] = replace(servers[-1], models=args.models.absolute())
    if args.quick:
        servers.pop()
    missing: dict[str, str] = {}
    for name in PEER_NAMES:
        if "none" in args.peers or ("all" not in args.peers and name not in args.peers):
            continue
        say(f"{name}: its environment in {args.peers_dir}")
        try:
            servers.append(Server(name, name, install(PEERS[name], args.peers_dir.expanduser().absolute())))
        except (PeerMissing, OSError) as error:
            say(f"  not measured: {error}")
            missing[name] = str(error)
    return servers, missing


def _plain(rows: list[Any]) -> list[Any]:
    """JSON has no NaN: a server that never answered has no latency."""
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
