"""`recap doctor`: what works on this machine, found out by trying it, and what to install for the rest.

Heavy packages are tried in child processes: the doctor itself needs only the standard library and rich, and a crash of
a graphics driver is a finding, not the end of the report.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DEMO, TRAIN, TEST, GPU = "demo", "training", "tests", "gpu"
DEMO_PORTS = (8000, 8001)  # defaults of `recap serve`; the demo itself takes free ones


@dataclass(frozen=True)
class Check:
    """One finding. purpose: which use of RECAP needs it. remedy: what to do when it is not ok (empty when it is)."""

    name: str
    purpose: str
    ok: bool
    found: str
    remedy: str = ""


def main(argv: list[str]) -> int:
    """Print the table (`--json` for machines); 0 when serving and simulating work here, 1 when not."""
    if unknown := [arg for arg in argv if arg not in ("--json", "-h", "--help")]:
        raise ValueError(f"recap doctor: expected --json or nothing, got {' '.join(unknown)}")
    if {"-h", "--help"} & set(argv):
        print(f"usage: recap doctor [--json]\n\n{main.__doc__}")
        return 0
    checks = examine()
    if "--json" in argv:
        print(json.dumps([asdict(check) for check in checks]))
    else:
        _print(checks)
    return 0 if serves(checks) else 1


def serves(checks: list[Check]) -> bool:
    """True when nothing that the demo needs is missing."""
    return all(check.ok for check in checks if check.purpose == DEMO)


def examine() -> list[Check]:
    """Try everything, a few at a time; order of the result is the order of the table."""
    trials: list[Callable[[], Check]] = [
        check_python, check_environment, check_packages, check_onnxruntime, check_rendering, check_video, check_ports,
        check_torch, check_lerobot, check_torchcodec, check_ffmpeg, check_browser,
        check_gpu, check_tensorrt, check_triton,
    ]  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda trial: trial(), trials))


def attempt(code: str, seconds: float = 60.0, environment: dict[str, str] | None = None) -> tuple[bool, str]:
    """Run Python code in a child of this interpreter: (it worked, last line it printed or of its error)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, check=False,
            env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, f"no answer within {seconds:.0f} s"
    text = done.stdout if done.returncode == 0 else done.stderr
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return done.returncode == 0, lines[-1].strip() if lines else f"exit code {done.returncode}"


def check_python() -> Check:
    ok = sys.version_info >= (3, 12)
    return Check("python", DEMO, ok, platform.python_version(), "" if ok else "Python 3.12")


def check_environment() -> Check:
    ok = sys.prefix != sys.base_prefix
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{Path(sys.prefix).name if ok else 'no virtual environment'}, {cores} cores, {platform.machine()}"
    return Check("environment", TEST, ok, found, "" if ok else "make install-demo (or make install) makes one")


def check_packages() -> Check:
    """The distributions that serving and the simulator import."""
    names = ["recap-client", "numpy", "msgpack", "websockets", "mcap", "tokenizers", "fastapi", "uvicorn", "metaworld"]
    missing = []
    for name in [*names, "mujoco", "matplotlib", "av", "prometheus-client", "structlog"]:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", DEMO, False, f"missing: {', '.join(missing)}", "make install-demo")
    return Check("packages", DEMO, True, "all that serving and the simulator import")


def check_onnxruntime() -> Check:
    ok, found = attempt(
        "import onnxruntime as o; print(o.__version__, ', '.join(p.removesuffix('ExecutionProvider') "
        "for p in o.get_available_providers()))"
    )
    return Check("onnxruntime", DEMO, ok, found, "" if ok else "make install-demo")


def check_rendering() -> Check:
    """Whether MuJoCo draws a picture that is not black, without a screen."""
    backend = os.environ.get("MUJOCO_GL") or ("egl" if sys.platform == "linux" else "")
    ok, found = attempt(
        "import mujoco\n"
        'xml = \'<mujoco><worldbody><light pos="0 0 3"/><geom size=".5" rgba="1 0 0 1"/></worldbody></mujoco>\'\n'
        "model = mujoco.MjModel.from_xml_string(xml); data = mujoco.MjData(model); mujoco.mj_forward(model, data)\n"
        "view = mujoco.Renderer(model, 64, 64); view.update_scene(data); picture = view.render()\n"
        "assert picture.max() > 50, 'the picture is black'\n"
        "print('MuJoCo', mujoco.__version__, 'draws 64x64')",
        environment={"MUJOCO_GL": backend} if backend else None,
    )
    remedy = "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0 libgles2 (Debian, Ubuntu)"
    return Check(f"rendering ({backend or 'default'})", DEMO, ok, found, "" if ok else remedy)


def check_video() -> Check:
    ok, found = attempt("import av; av.codec.Codec('libx264', 'w'); print('PyAV', av.__version__, 'with libx264')")
    return Check("video", DEMO, ok, found, "" if ok else "make install-demo")


def check_ports() -> Check:
    busy = [port for port in DEMO_PORTS if not _free(port)]
    if busy:
        remedy = "recap serve all --policy-port P --critic-port C (the demo takes free ports by itself)"
        return Check("ports", TEST, False, f"in use: {', '.join(map(str, busy))}", remedy)
    return Check("ports", TEST, True, f"{' and '.join(map(str, DEMO_PORTS))} are free")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def check_torch() -> Check:
    ok, found = attempt("import torch; print(torch.__version__, torch.get_num_threads(), 'threads')", 120)
    return Check("torch", TRAIN, ok, found, "" if ok else "make install")


def check_lerobot() -> Check:
    ok, found = attempt("from importlib.metadata import version; import lerobot; print(version('lerobot'))", 120)
    return Check("lerobot", TRAIN, ok, found, "" if ok else "make install (lerobot==0.6.1 needs Python 3.12)")


def check_torchcodec() -> Check:
    ok, found = attempt("import torchcodec, torchcodec.decoders; print(torchcodec.__version__)", 120)
    return Check("torchcodec", TRAIN, ok, found, "" if ok else "make install; apt-get install ffmpeg (video datasets)")


def check_ffmpeg() -> Check:
    path = shutil.which("ffmpeg")
    return Check("ffmpeg", TRAIN, bool(path), path or "not on PATH", "" if path else "apt-get install ffmpeg")


def check_browser() -> Check:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    ok = bool(browser and driver)
    found = f"{browser or 'no chromium'}, {driver or 'no chromedriver'}"
    return Check("browser", TEST, ok, found, "" if ok else "apt-get install chromium chromium-driver")


def check_gpu() -> Check:
    tool = shutil.which("nvidia-smi")
    if not tool:
        return Check("cuda", GPU, False, "no nvidia-smi on PATH", "a CUDA driver; everything also runs on the CPU")
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    found = done.stdout.strip().replace("\n", "; ") or done.stderr.strip()
    return Check("cuda", GPU, done.returncode == 0, found, "" if done.returncode == 0 else "see nvidia-smi")


def check_tensorrt() -> Check:
    ok, found = attempt("import tensorrt; print(tensorrt.__version__)")
    return Check(
        "tensorrt", GPU, ok, found if ok else "not installed", "" if ok else "NVIDIA's TensorRT wheels or container"
    )


def check_triton() -> Check:
    path = shutil.which("tritonserver")
    remedy = "" if path else "NVIDIA's Triton container; `recap serve --engine onnxruntime` needs none"
    return Check("tritonserver", GPU, bool(path), path or "not on PATH", remedy)


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="recap doctor", title_justify="left", expand=False)
    for column in ("for", "what", "", "found", "to get it"):
        table.add_column(column, overflow="fold")
    for check in checks:
        mark = "[green]works[/]" if check.ok else ("[red]missing[/]" if check.purpose == DEMO else "[yellow]no[/]")
        table.add_row(check.purpose, check.name, mark, check.found, check.remedy)
    console = Console()
    console.print(table)
    ready = (
        "ready: `recap demo` and `recap serve` work here" if serves(checks) else "not ready to serve: see the red rows"
    )
    console.print(ready)
