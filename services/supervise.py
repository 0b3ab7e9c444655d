"""Processes of `recap serve`: one service in this process, or both in children that are watched over.

Two processes, because a critic that shares an interpreter with the policy takes time from every robot's next chunk.
"""

import asyncio
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from rich.console import Console

from recap_client.spec import require_equal
from services.common.server import DrainingServer, bind, make_server
from services.common.settings import (
    API_KEY_VARIABLE,
    CriticSettings,
    ModelSource,
    PolicySettings,
    Recording,
    admin_key_from,
    api_key_from,
)
from services.exposure import access, critic_tls, tls, warn
from services.options import ServeArgs

_SETUP_FAILED = 2
_RESTARTS = 5
_WITHIN_S = 60.0
_STOP_S = 5.0

console = Console(stderr=True, highlight=False)


def serve_one(args: ServeArgs, ready: Any = None) -> int:
    """Serve one service until SIGTERM or SIGINT. ready: an event to set when requests are answered."""
    from services.common.heap import keep_heap
    from services.common.logs import configure

    keep_heap()
    configure(args.log_format)
    policy = args.what == "policy"
    sock = bind(args.host, args.policy_port if policy else args.critic_port)  # first: a taken port needs no loading
    for port in _front_ports(args) if policy else ():
        bind(args.host, port).close()
    certificate = tls(args)
    app = _policy_app(args) if policy else _critic_app(args)
    server = make_server(app, app.state.limits, certificate)
    warn(args)
    factory = server.config.get_loop_factory()  # uvloop where it is installed: a tenth of a millisecond a request
    asyncio.run(_serve(server, sock, args, ready), loop_factory=factory)
    return 0


def serve_all(args: ServeArgs) -> int:
    """Serve both, each in a process of its own; restart one that dies, give up on one that keeps dying."""
    for port in (args.policy_port, args.critic_port, *_front_ports(args)):
        bind(args.host, port).close()
    tls(args)
    _check_pair(args)
    if args.keys is not None and api_key_from() is None:
        os.environ[API_KEY_VARIABLE] = secrets.token_urlsafe(32)  # with which the policy calls the critic
    return _Supervisor(args).run()


def _policy_app(args: ServeArgs) -> Any:
    from services.policy.app import create_app
    from services.policy.pipeline import load_policy_engine

    kind, threads, version = _engine(args), args.engine_threads, args.model_version
    engine = load_policy_engine(args.models, args.beta, kind, threads, version)
    engine.warm_up()
    settings = PolicySettings(
        args.beta,
        args.critic_url,
        args.critic_hz,
        args.seed,
        api_key_from(),
        args.host,
        args.lerobot_port,
        args.groot_port,
        args.limits,
        access(args),
        tls(args),
        critic_tls(args),
        source=ModelSource(args.models, kind, threads, admin_key_from(), args.audit, version),
        record=_recording(args),
        noise_scale=args.noise_scale,
    )
    return create_app(engine, settings)


def _engine(args: ServeArgs) -> str:
    """The kind that `load_engine` takes."""
    if args.triton_url is None:
        return args.engine
    if args.engine != "triton":
        raise ValueError(f"--triton-url: expected --engine triton beside it, got --engine {args.engine}")
    return f"triton@{args.triton_url}"


def _recording(args: ServeArgs) -> Recording | None:
    if args.record is None:
        return None
    return Recording(args.record, args.record_images, int(args.record_min_free * 2**30), args.record_gap)


def _front_ports(args: ServeArgs) -> list[int]:
    return [port for port in (args.lerobot_port, args.groot_port) if port is not None]


def _critic_app(args: ServeArgs) -> Any:
    from services.common.engine import load_engine
    from services.critic.app import create_app

    engine = load_engine(args.models, "critic", _engine(args) if args.engine == "triton" else "onnxruntime")
    engine.warm_up()
    return create_app(engine, CriticSettings(api_key=api_key_from(), access=access(args)))


def _check_pair(args: ServeArgs) -> None:
    """The critic must read what the policy reads."""
    from services.common.repository import open_model

    policy = open_model(args.models, "policy" if args.beta == 1.0 else "policy_guided", args.model_version)
    critic = open_model(args.models, "critic")
    require_equal(policy.spec.robot, critic.spec.robot, what=f"{args.models}: critic beside policy")


async def _serve(server: DrainingServer, sock: Any, args: ServeArgs, ready: Any) -> None:
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    if server.started and ready is None:
        announce(args)
    elif server.started:
        ready.set()
    await task


def announce(args: ServeArgs) -> None:
    """Print where everything is."""
    at, s = _url_host(args.host), "" if args.tls_cert is None else "s"
    if args.what != "critic":
        console.print(f"policy     ws{s}://{at}:{args.policy_port}/act   (openpi protocol and recap.v1; POST /act)")
        if args.lerobot_port is not None:
            console.print(f"lerobot    {at}:{args.lerobot_port}   (--server_address of LeRobot's robot client)")
        if args.groot_port is not None:
            console.print(f"groot      tcp://{at}:{args.groot_port}   (host and port of GR00T's policy client)")
    if args.what != "policy":
        console.print(f"critic     ws{s}://{at}:{args.critic_port}/value")
        console.print(f"dashboard  http{s}://{at}:{args.critic_port}/")
    console.print("ready; Ctrl-C stops")


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _complain(what: str) -> None:
    console.print(f"recap serve: {what}", style="red", soft_wrap=True, markup=False)


def serve_child(args: ServeArgs, ready: Any) -> None:
    """Body of a child process; ready: a multiprocessing event."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; until we serve, the parent decides
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        code = serve_one(args, ready)
    except ValueError as error:  # all our set-up errors are; they name the thing and need no traceback
        _complain(f"{args.what}: {error}")
        code = _SETUP_FAILED
    sys.exit(code)


def _follow_parent() -> None:
    """End when the supervisor is gone, even if it was killed and could tell nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


class _Supervisor:
    def __init__(self, args: ServeArgs) -> None:
        self._args = args
        self._context = multiprocessing.get_context("spawn")
        self._children: dict[str, BaseProcess] = {}
        self._ready: dict[str, Any] = {}  # held here: a child that starts up must still find its event
        self._starts: dict[str, list[float]] = {"policy": [], "critic": []}
        self._wake_read, self._wake_write = multiprocessing.Pipe(duplex=False)
        self._stopping = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        events = [self._start("critic"), self._start("policy")]
        code = self._wait_ready(events)
        if code is None:
            announce(self._args)
            code = self._watch()
        self._stop_children()
        return code

    def _stop(self, *_: Any) -> None:
        self._stopping = True
        self._wake_write.send(None)

    def _start(self, what: str) -> Any:
        at = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._args.host, _url_host(self._args.host))
        scheme, ca = ("ws", None) if self._args.tls_cert is None else ("wss", self._args.tls_cert)
        url = self._args.critic_url or f"{scheme}://{at}:{self._args.critic_port}/value"
        ca = self._args.critic_ca if self._args.critic_url else ca
        args = replace(self._args, what=what, critic_url=url, critic_ca=ca)  # type: ignore[arg-type]
        ready = self._ready[what] = self._context.Event()
        child = self._context.Process(target=serve_child, args=(args, ready), name=f"recap-{what}")
        child.start()
        self._children[what] = child
        self._starts[what].append(time.monotonic())
        return ready

    def _wait_ready(self, events: list[Any]) -> int | None:
        """None when all are ready; else the exit code: a child that does not even start is not tried again."""
        while not all(event.is_set() for event in events):
            if self._stopping:
                return 0
            dead = [(what, child) for what, child in self._children.items() if child.exitcode is not None]
            if dead:
                what, child = dead[0]
                _complain(f"the {what} service did not start (exit code {child.exitcode})")
                return child.exitcode or 1
            time.sleep(0.02)
        return None

    def _watch(self) -> int:
        while not self._stopping:
            wait([self._wake_read, *(child.sentinel for child in self._children.values())])
            if self._stopping:
                break
            for what, child in list(self._children.items()):
                if child.exitcode is None:
                    continue
                recent = [start for start in self._starts[what] if time.monotonic() - start < _WITHIN_S]
                if child.exitcode == _SETUP_FAILED or len(recent) > _RESTARTS:
                    alone = what == "critic"
                    _complain(
                        f"the {what} service ended with exit code {child.exitcode} and cannot be kept running "
                        f"({len(recent)} starts in {_WITHIN_S:.0f} s); "
                        + ("the policy serves on without it" if alone else "stopping")
                    )
                    if alone:
                        del self._children[what]
                        continue
                    return 1
                _complain(f"the {what} service ended with exit code {child.exitcode}; restarting it")
                time.sleep(min(0.2 * len(recent), 1.0))
                self._start(what)
        return 0

    def _stop_children(self) -> None:
        for child in self._children.values():
            child.terminate()
        limit = time.monotonic() + _STOP_S
        for what, child in self._children.items():
            child.join(max(0.0, limit - time.monotonic()))
            if child.exitcode is None:
                _complain(f"the {what} service did not stop within {_STOP_S:.0f} s; killed")
                child.kill()
                child.join()
