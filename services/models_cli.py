"""`recap models list|load|promote|rollback|unload`: the models of a running policy service, by HTTP."""

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import tyro

from services.common.settings import ADMIN_KEY_VARIABLE

_LOADING_S = 600.0


class ModelsError(ValueError):
    """The service refused, or could not be reached."""


@dataclass(frozen=True)
class At:
    """The admin's key comes from RECAP_ADMIN_KEY in the environment."""

    url: str = "http://127.0.0.1:8000"
    """The policy service."""


@dataclass(frozen=True)
class Load(At):
    """Load a model of the service's repository beside the live one, and give it its part."""

    state: Literal["shadow", "canary", "live"] = "shadow"
    """shadow: asked but never sent; canary: answers a share of the episodes; live: answers all from their next episode
    on."""
    version: int | None = None
    """Version folder; the highest when left out."""
    path: str | None = None
    """Another repository below the service's own."""
    share: float = 0.1
    """Of the episodes that a canary answers, 0 to 1."""
    every: int = 10
    """A shadow sees each so-manieth request."""
    force: bool = False
    """Change at once, in the middle of episodes too."""


@dataclass(frozen=True)
class Promote(At):
    """Make the canary, or the shadow, the live model."""

    state: Literal["shadow", "canary"] | None = None
    """Which one; the canary when there is one."""
    force: bool = False
    """Change at once, in the middle of episodes too."""


def list_(argv: list[str]) -> int:
    """What is loaded."""
    args = tyro.cli(At, args=argv, prog="recap models list", description="The models of a policy service.")
    return _show(call(args.url, None))


def load(argv: list[str]) -> int:
    """Load a model; waits until it is there."""
    args = tyro.cli(Load, args=argv, prog="recap models load", description=Load.__doc__)
    names = ("state", "version", "path", "share", "every", "force")
    return _show(call(args.url, "load", {name: getattr(args, name) for name in names}))


def promote(argv: list[str]) -> int:
    """Trial to live."""
    args = tyro.cli(Promote, args=argv, prog="recap models promote", description=Promote.__doc__)
    return _show(call(args.url, "promote", {"state": args.state, "force": args.force}))


def rollback(argv: list[str]) -> int:
    """Undo the last change."""
    what = "End the canary, or go back to the previous live model, at once."
    args = tyro.cli(At, args=argv, prog="recap models rollback", description=what)
    return _show(call(args.url, "rollback", {}))


def unload(argv: list[str]) -> int:
    """End the shadow."""
    args = tyro.cli(At, args=argv, prog="recap models unload", description="End the shadow and free its memory.")
    return _show(call(args.url, "unload", {}))


def call(url: str, action: str | None, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ask a service; its answer. Raises ModelsError with the service's own words."""
    key = os.environ.get(ADMIN_KEY_VARIABLE)
    if not key:
        raise ModelsError(f"{ADMIN_KEY_VARIABLE}: expected the admin's key in the environment, got none")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ModelsError(f"--url: expected http://HOST:PORT of a policy service, got {url!r}")
    address = f"{parts.scheme}://{parts.netloc}/models" + (f"/{action}" if action else "")
    data = None if options is None else json.dumps(options).encode()
    request = urllib.request.Request(address, data, {"Authorization": f"Bearer {key}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # robots' services are not behind a proxy
    try:
        with opener.open(request, timeout=_LOADING_S) as reply:
            answer: dict[str, Any] = json.load(reply)
            return answer
    except urllib.error.HTTPError as error:
        raise ModelsError(f"{address}: {_words(error)}") from error
    except (OSError, ValueError) as error:
        raise ModelsError(f"{address}: expected a policy service, got none: {error}") from error


def _words(error: urllib.error.HTTPError) -> str:
    try:
        return f"{error.code}: {json.load(error)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code}: expected the answer of a policy service, got another"


def _hint(listing: dict[str, Any]) -> None:
    """What a restart would undo."""
    live, versions = str(listing["live"]["version"]), listing.get("versions", [])
    if versions and live != str(versions[-1]):
        print(f"a restart serves version {versions[-1]}, unless `recap serve` has --model-version {live}")


def _show(listing: dict[str, Any]) -> int:
    for part in ("live", "previous", "canary", "shadow"):
        model = listing.get(part)
        extra = "".join(f"  {name} {model[name]}" for name in ("share", "every") if model and name in model)
        print(f"{part:<9} {'-' if model is None else '{name} {version}  {hash:.12}'.format(**model)}{extra}")
    print(f"versions  {', '.join(map(str, listing.get('versions', [])))}")
    _hint(listing)
    print(json.dumps(listing))
    return 0
