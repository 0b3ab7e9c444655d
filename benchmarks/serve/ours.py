"""The policy service with an engine of `benchmarks.serve.engines`; all else is what `recap serve policy` runs."""

import argparse
import asyncio
from pathlib import Path

from benchmarks.serve.engines import NullEngine, TinyEngine
from benchmarks.serve.payloads import PAYLOADS
from benchmarks.serve.standalone.lifeline import end_with_parent
from services.common.heap import keep_heap
from services.common.logs import configure
from services.common.server import bind, make_server
from services.common.settings import PolicySettings
from services.policy.app import create_app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("payload", choices=list(PAYLOADS))
    parser.add_argument("--models", type=Path, help="the repository of the tiny engine; without it the null engine")
    args = parser.parse_args()
    end_with_parent()
    keep_heap()
    configure("json")
    payload = PAYLOADS[args.payload]
    engine = NullEngine(payload) if args.models is None else TinyEngine(payload, args.models)
    app = create_app(engine, PolicySettings())
    server = make_server(app, app.state.limits)
    asyncio.run(server.serve(sockets=[bind("127.0.0.1", args.port)]), loop_factory=server.config.get_loop_factory())


if __name__ == "__main__":
    main()
