"""A server must not outlive the benchmark that started it, however that ends."""

import os
import signal
import sys
import threading


def end_with_parent() -> None:
    """SIGTERM to this process when its standard input ends, which a parent's death does to a pipe."""
    threading.Thread(target=_wait, name="lifeline", daemon=True).start()


def _wait() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
