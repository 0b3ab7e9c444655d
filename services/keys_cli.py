"""`recap keys add | list | revoke`: the key file of the services. A new key is printed once and kept nowhere."""

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import tyro

from services.common.keys import Key, Scope, changing, new_key, read_keys, readable_by_others, write_keys
from services.common.settings import Quota

_DAY_S = 86_400.0


@dataclass(frozen=True)
class AddArgs:
    """Add a key to a file, which is made when there is none, and print it: once, on standard output."""

    file: Annotated[Path, tyro.conf.Positional]
    id: str
    """Its name in logs, and in the key: a-z, 0-9 and -; e.g. of the robot that gets it."""
    scopes: tuple[Scope, ...] = ("act", "value")
    """act: the policy; value: the critic and its dashboard; admin: change models."""
    rate: float | None = None
    """Requests a second; without limits of its own the key has the service's."""
    burst: float | None = None
    """So many at once after a pause; one second's worth unless said."""
    bytes_per_s: float | None = None
    in_flight: int | None = None
    """Unanswered requests at once."""
    sessions: int | None = None
    """Sessions at once."""
    days: float | None = None
    """Expires after so many days."""


@dataclass(frozen=True)
class ListArgs:
    """Show the keys of a file: never the keys themselves, which it does not hold."""

    file: Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class RevokeArgs:
    """End a key: services that follow the file refuse it within a second, and end its sessions."""

    file: Annotated[Path, tyro.conf.Positional]
    id: Annotated[str, tyro.conf.Positional]


def add(argv: list[str]) -> int:
    """Entry point of `recap keys add`; returns the exit code."""
    args = tyro.cli(AddArgs, args=argv, prog="recap keys add", description=AddArgs.__doc__)
    now = time.time()
    quota = Quota(args.rate, args.burst, args.bytes_per_s, args.in_flight, args.sessions)
    expires = None if args.days is None else now + args.days * _DAY_S
    key, text = new_key(args.id, args.scopes, quota, expires=expires, now=now)
    with changing(args.file):
        keys = read_keys(args.file) if args.file.exists() else {}
        if key.id in keys:
            raise ValueError(
                f"{args.file}: the id {key.id!r} is taken (or was, and is kept for the logs); choose another"
            )
        write_keys(args.file, keys | {key.id: key})
    print(text)
    return 0


def show(argv: list[str]) -> int:
    """Entry point of `recap keys list`; returns the exit code."""
    args = tyro.cli(ListArgs, args=argv, prog="recap keys list", description=ListArgs.__doc__)
    now = time.time()
    print(f"{'id':<20}{'scopes':<18}{'state':<24}{'made':<12}limits")
    for key in read_keys(args.file).values():
        limits = ", ".join(f"{name} {value:g}" for name, value in vars(key.quota).items() if value is not None)
        print(f"{key.id:<20}{','.join(key.scopes):<18}{_state(key, now):<24}{_day(key.created):<12}{limits or '-'}")
    if readable_by_others(args.file):
        print(f"every account of this machine can read this file: chmod 600 {args.file}")
    return 0


def revoke(argv: list[str]) -> int:
    """Entry point of `recap keys revoke`; returns the exit code."""
    args = tyro.cli(RevokeArgs, args=argv, prog="recap keys revoke", description=RevokeArgs.__doc__)
    with changing(args.file):
        keys = read_keys(args.file)
        if args.id not in keys:
            raise ValueError(f"{args.file}: expected one of {', '.join(keys) or '(no keys)'}, got {args.id!r}")
        if keys[args.id].revoked is None:
            write_keys(args.file, keys | {args.id: replace(keys[args.id], revoked=time.time())})
    print(f"{args.id}: revoked")
    return 0


def _state(key: Key, now: float) -> str:
    if key.revoked is not None:
        return f"revoked {_day(key.revoked)}"
    if key.expires is None:
        return "good"
    return f"{'expired' if key.trouble(now) else 'good until'} {_day(key.expires)}"


def _day(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
