"""A file of API keys: JSON lines with what a key may do, and a salted hash of it instead of the key.

A key is `recap_ID.SECRET`, its secret 32 random bytes. The hash is one SHA-256 over salt and secret, not scrypt: slow
hashes protect what people think up, and 256 random bits cannot be searched at any speed, while a slow hash in the way
of every connection would let strangers spend the service's time. The id in the key says which line to look at, so that
a check is one hash whatever the number of keys; an id that is not there costs the same hash.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from services.common.settings import Quota

Scope = Literal["act", "value", "admin"]
SCOPES: tuple[Scope, ...] = ("act", "value", "admin")

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_PREFIX = "recap_"
_LONGEST = 256  # characters; hashing megabytes is work that strangers must not give us
_FIELDS = {"id", "salt", "sha256", "scopes", "quota", "created", "expires", "revoked"}


class KeyFileError(ValueError):
    """A key file is not there, not readable, not safe, or has a line that is no key; names the file and the line."""


@dataclass(frozen=True)
class Key:
    """salt, sha256: hexadecimal. created, expires, revoked: seconds since the epoch, None = never."""

    id: str
    salt: str
    sha256: str
    scopes: tuple[Scope, ...] = ("act", "value")
    quota: Quota = field(default_factory=Quota)
    created: float | None = None
    expires: float | None = None
    revoked: float | None = None

    def trouble(self, now: float) -> str | None:
        """Why this key is not good any more, or None. now: seconds since the epoch."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else None


Keys = Mapping[str, Key]
"""Keys by id."""

_NOBODY = Key("nobody", "00" * 16, "00" * 32)


def new_key(key_id: str, scopes: Iterable[str] = ("act", "value"), quota: Quota | None = None, *,
            expires: float | None = None, now: float | None = None) -> tuple[Key, str]:  # fmt: skip
    """A fresh key: what goes into the file, and the text for its owner, which is nowhere else. Raises ValueError."""
    secret, salt = secrets.token_urlsafe(32), secrets.token_hex(16)
    chosen = tuple(dict.fromkeys(scopes))
    key = Key(key_id, salt, _hash(salt, secret), cast("tuple[Scope, ...]", chosen), quota or Quota(),
              time.time() if now is None else now, expires)  # fmt: skip
    _check(key)
    return key, f"{_PREFIX}{key_id}.{secret}"


def matching(keys: Keys, presented: str) -> Key | None:
    """The key that `presented` is, revoked and expired ones too; None when it is none. Compares in constant time."""
    if len(presented) > _LONGEST:
        return None
    key_id, _, secret = presented.removeprefix(_PREFIX).partition(".")
    key = keys.get(key_id, _NOBODY)
    fits = hmac.compare_digest(_hash(key.salt, secret), key.sha256)
    return key if fits and key is not _NOBODY else None


def read_keys(path: Path) -> dict[str, Key]:
    """The keys of a file, in its order. Raises KeyFileError."""
    try:
        lines = path.read_text("utf-8").splitlines()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(
            f"{path}: cannot read the key file ({error}); make one with `recap keys add {path} --id NAME`"
        ) from error
    if mode & stat.S_IWOTH:
        raise KeyFileError(f"{path}: everyone may write here, and so add a key; `chmod 600 {path}`")
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            key = _from_json(json.loads(line))
            if key.id in keys:
                raise ValueError(f"id {key.id!r} a second time")
        except (ValueError, TypeError, RecursionError) as error:
            raise KeyFileError(
                f"{path}, line {number}: expected a key as `recap keys add` writes it: {error}"
            ) from error
        keys[key.id] = key
    return keys


def readable_by_others(path: Path) -> bool:
    """Whether other accounts of this machine can read the file."""
    return bool(path.stat().st_mode & stat.S_IROTH)


def write_keys(path: Path, keys: Keys) -> None:
    """Replace the file at once; a new one belongs to its owner alone, an old one keeps its owner and mode."""
    text = "".join(json.dumps(_to_json(key)) + "\n" for key in keys.values())
    path = path.resolve()
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        if path.exists():
            old = path.stat()
            os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
            if os.geteuid() == 0:  # else the service's own account could no longer read what root has changed
                os.fchown(descriptor, old.st_uid, old.st_gid)
        stream.write(text)
        stream.flush()
        os.fsync(descriptor)
    os.replace(new, path)


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Keeps other writers of the file away. Raises KeyFileError when there is one."""
    lock = path.resolve().with_name(path.name + ".lock")
    try:
        os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise KeyFileError(f"{path}: being changed by another `recap keys`; if there is none, delete {lock}") from None
    except OSError as error:
        raise KeyFileError(f"{path}: cannot write beside it ({error.strerror})") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _hash(salt: str, secret: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + secret.encode("utf-8", "surrogatepass")).hexdigest()


def _to_json(key: Key) -> dict[str, Any]:
    parts = asdict(key)
    parts["quota"] = {name: value for name, value in parts["quota"].items() if value is not None}
    return {name: value for name, value in parts.items() if value not in (None, {})}


def _from_json(data: Any) -> Key:
    if not isinstance(data, dict) or not {"id", "salt", "sha256"} <= set(data) or not set(data) <= _FIELDS:
        raise ValueError(f"expected a map with id, salt, sha256 and no others than {sorted(_FIELDS)}")
    scopes = data.get("scopes", ["act", "value"])
    if not isinstance(scopes, list):
        raise ValueError(f"scopes: expected a list, got {type(scopes).__name__}")
    key = Key(**{**data, "scopes": tuple(scopes), "quota": Quota(**data.get("quota", {}))})
    _check(key)
    return key


def _check(key: Key) -> None:
    if not isinstance(key.id, str) or not _ID.fullmatch(key.id):
        raise ValueError(f"id: expected 1 to 32 of a-z, 0-9 and -, not beginning with -, got {key.id!r}")
    if not key.scopes or not set(key.scopes) <= set(SCOPES):
        raise ValueError(f"scopes: expected some of {', '.join(SCOPES)}, got {list(key.scopes)}")
    if len(bytes.fromhex(key.salt)) < 16 or len(bytes.fromhex(key.sha256)) != 32:
        raise ValueError("salt and sha256: expected 16 and 32 bytes in hexadecimal")
    for name in ("created", "expires", "revoked"):
        value = getattr(key, name)
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{name}: expected seconds since the epoch, got {value!r}")
