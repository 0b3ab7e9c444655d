"""Other projects' servers: which release of each, and an environment of its own to run it in."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_STAMP = "requirements.txt"
_INSTALL_S = 1800.0
_SCRIPTS_NEED = ("msgpack==1.2.4", "numpy", "pillow")


class PeerMissing(ValueError):
    """A peer cannot be installed here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """requirements: as pip takes them, the peer itself pinned. note: what of it is measured, for the table."""

    name: str
    requirements: tuple[str, ...]
    note: str


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "lerobot",
            ("lerobot[async]==0.6.1",),
            "LeRobot 0.6.1, its asynchronous policy server over gRPC with a plug-in policy that returns zeros; "
            "its 33 ms floor (hidden while a robot asks less often than that), one robot at a time, raw frames only",
        ),
        Peer("vlagents", ("vlagents==0.3.0",), "vlagents 0.3.0, its RPyC server over TCP, JSON with base64 frames"),
        Peer("ray", ("ray[serve]==2.60.0",), "Ray Serve 2.60.0, one replica, HTTP, the body of openpi's message"),
        Peer("litserve", ("litserve==0.2.19",), "LitServe 0.2.19, one worker, HTTP, the body of openpi's message"),
    )
}


def install(peer: Peer, peers_dir: Path) -> Path:
    """The interpreter of `peer`'s environment, made when it is not there or was made from other requirements.

    Raises PeerMissing with the end of what the installer said.
    """
    folder = peers_dir / peer.name
    python, stamp = folder / "bin" / "python", folder / _STAMP
    wanted = "\n".join((*peer.requirements, *_SCRIPTS_NEED, sys.version)) + "\n"
    if python.exists() and stamp.is_file() and stamp.read_text() == wanted:
        return python
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise PeerMissing("needs `uv` to make its environment; install it with `pip install uv`")
    _run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)])
    _run([uv, "pip", "install", "--quiet", "--python", str(python), *peer.requirements, *_SCRIPTS_NEED])
    stamp.write_text(wanted)  # last: an installation that was cut short is made again
    return python


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise PeerMissing(f"`{' '.join(command[1:3])}` took more than {_INSTALL_S:.0f} s") from error
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:] or "nothing"
        raise PeerMissing(f"`{' '.join(command[1:3])}` ended with {done.returncode}: {said}")
