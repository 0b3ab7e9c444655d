"""Health checks of the images, for a base without curl.

`healthcheck.py URL`: exit 0 when URL answers 2xx within 3 s. `healthcheck.py --fresh FOLDER SECONDS`: exit 0 when a
file below FOLDER was written in the last SECONDS. Else exit 1 with one line that says what was found.
"""

import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def answers(url: str) -> str | None:
    """None when `url` answers 2xx, else what was wrong. A certificate is not checked: this asks its own container."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=3, context=context):
            return None
    except urllib.error.HTTPError as error:
        return f"{url}: expected 2xx, got {error.code} {error.read(200).decode(errors='replace')}"
    except OSError as error:
        return f"{url}: {error}"


def fresh(folder: Path, seconds: float) -> str | None:
    """None when a file below `folder` is younger than `seconds`, else what was wrong."""
    ages = [time.time() - (Path(at) / name).stat().st_mtime for at, _, names in os.walk(folder) for name in names]
    if ages and min(ages) < seconds:
        return None
    return f"{folder}: expected a file of the last {seconds:.0f} s, " + (
        f"the newest is {min(ages):.0f} s old" if ages else "found none"
    )


def main(arguments: list[str]) -> int:
    """Exit code: 0 healthy, 1 not, 2 wrong arguments."""
    if arguments[:1] == ["--fresh"] and len(arguments) == 3:
        trouble = fresh(Path(arguments[1]), float(arguments[2]))
    elif len(arguments) == 1:
        trouble = answers(arguments[0])
    else:
        print(__doc__, file=sys.stderr)
        return 2
    if trouble:
        print(trouble)
    return 1 if trouble else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
