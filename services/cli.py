"""`recap serve` and `recap bench`."""

import tyro

from services.options import BenchArgs, ServeArgs


def serve(argv: list[str]) -> int:
    """Entry point of `recap serve`; returns the exit code."""
    args = tyro.cli(ServeArgs, args=argv, prog="recap serve", description=ServeArgs.__doc__)
    from services.supervise import serve_all, serve_one  # after --help: it imports the web server

    return serve_all(args) if args.what == "all" else serve_one(args)


def bench(argv: list[str]) -> int:
    """Entry point of `recap bench`; returns the exit code. The last line is one JSON object."""
    args = tyro.cli(BenchArgs, args=argv, prog="recap bench", description=BenchArgs.__doc__)
    from services.bench import run

    return run(args.models, requests=args.requests, warm_up=args.warm_up, beta=args.beta, engine=args.engine)
