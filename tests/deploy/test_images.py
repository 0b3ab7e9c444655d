"""The images. No container engine runs here, so their steps run in a clean environment and an empty folder (slow)."""

import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import dockerfile_steps as docker
from engine_laws import batch
from services.common.engine import load_engine
from triton_server import environment as triton_environment
from triton_server import free_ports, triton_repository

ROOT = Path(__file__).resolve().parents[2]
IMAGES = {path.name.removesuffix(".Dockerfile"): path for path in sorted((ROOT / "docker").glob("*.Dockerfile"))}
SERVING = ("policy", "critic", "client-sim")
PYTHON = Path(sys.base_prefix) / "bin" / "python3.12"


def allowed_into_the_context(source: str) -> bool:
    """By .dockerignore, which refuses everything and then names what may come in."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = [line[1:] for line in lines if line.startswith("!")]
    return any(source == name or source.startswith(name + "/") for name in allowed)


def test_every_service_has_an_image() -> None:
    assert set(IMAGES) == {"policy", "critic", "client-sim", "train", "triton"}


@pytest.mark.parametrize("name", IMAGES)
def test_bases_are_pinned(name: str) -> None:
    for stage in docker.read(IMAGES[name]):
        tag = stage.image.rpartition("/")[2].partition(":")[2]
        assert re.search(r"\d+\.\d+", tag) and "latest" not in tag, stage.image


@pytest.mark.parametrize("name", IMAGES)
def test_what_is_copied_exists_and_reaches_the_build(name: str) -> None:
    stages = docker.read(IMAGES[name])
    names = {stage.name for stage in stages}
    for stage in stages:
        for copy in stage.copies:
            if copy.origin is not None:
                assert copy.origin in names
                continue
            for source in copy.sources:
                assert (ROOT / source).exists(), f"{name}: COPY {source}"
                assert allowed_into_the_context(source), f"{name}: .dockerignore keeps {source} away"


@pytest.mark.parametrize("name", IMAGES)
def test_images_run_without_root_and_are_watched(name: str) -> None:
    last = docker.read(IMAGES[name])[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last.last("USER") or ""), "a number: Kubernetes checks runAsNonRoot by it"
    words = [step.word for step in last.steps]
    assert not {"RUN", "COPY"} & set(words[words.index("USER") :]), (
        "all of the image belongs to root: nobody changes it"
    )
    health = last.last("HEALTHCHECK") or ""
    assert health == "NONE" if name == "train" else last.health_command
    assert last.command()[0].startswith("/") or last.command()[0] == "tritonserver"


@pytest.mark.parametrize("name", SERVING)
def test_serving_images_hold_no_training(name: str) -> None:
    text = IMAGES[name].read_text()
    for unwanted in ("COPY training", "COPY exporters", "[train", "lerobot["):
        assert unwanted not in text
    assert "--constraints requirements/full.txt" in text


def test_the_parser_sees_stages_copies_and_joined_lines(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text(
        "# a comment\nFROM a:1.2 AS x\nCOPY one two /opt/\nRUN first \\\n    && second\n"
        'FROM b:3.4\nCOPY --from=x /opt/e /opt/e\nENV A=1 B="two words"\nENTRYPOINT ["/opt/e"]\nCMD ["-v"]\n'
    )
    first, last = docker.read(file)
    assert (first.image, first.name, first.all("RUN")) == ("a:1.2", "x", ["first && second"])
    assert first.copies == [docker.Copy(("one", "two"), "/opt/", None)]
    assert last.copies == [docker.Copy(("/opt/e",), "/opt/e", "x")]
    assert last.environment == {"A": "1", "B": "two words"}
    assert last.command() == ["/opt/e", "-v"] and last.command("-q") == ["/opt/e", "-q"]
    file.write_text("RUN first\n")
    with pytest.raises(ValueError, match="expected FROM first, got RUN first"):
        docker.read(file)


def test_a_build_may_be_given_arguments_and_another_source(tmp_path: Path) -> None:
    (tmp_path / "context/wheels").mkdir(parents=True)
    (tmp_path / "others").mkdir()
    (tmp_path / "others/a.whl").write_text("other")
    file = tmp_path / "Dockerfile"
    file.write_text('FROM a:1.2\nARG OPTIONS=""\nCOPY wheels /wheels\nRUN echo "<$OPTIONS>" > /wheels/options\n')
    root, kept = tmp_path / "root", tmp_path / "kept"
    kept.mkdir()
    arguments, instead = {"OPTIONS": "--no-index -q"}, {"wheels": tmp_path / "others"}
    text = docker.script(docker.read(file), tmp_path / "context", root, kept, arguments, instead)
    subprocess.run(["bash", "-c", text], check=True, capture_output=True)
    assert (root / "wheels/a.whl").read_text() == "other"
    assert (root / "wheels/options").read_text() == "<--no-index -q>\n"


def test_the_script_builds_the_last_stage_from_what_was_copied_alone(tmp_path: Path) -> None:
    context = tmp_path / "context"
    (context / "sources/deep").mkdir(parents=True)
    (context / "sources/deep/file").write_text("content")
    file = tmp_path / "Dockerfile"
    file.write_text(
        "FROM a:1.2 AS build\nWORKDIR /src\nCOPY sources sources\nRUN mkdir -p /opt && cp sources/deep/file /opt/made\n"
        "RUN apt-get install nothing\nFROM a:1.2\nCOPY --from=build /opt /opt\nRUN cat /opt/made > /opt/again\n"
    )
    root, kept = tmp_path / "root", tmp_path / "kept"
    kept.mkdir()
    text = docker.script(docker.read(file), context, root, kept)
    subprocess.run(["bash", "-c", text], check=True, capture_output=True)
    assert (root / "opt/again").read_text() == "content"
    assert sorted(path.name for path in root.iterdir()) == ["opt"]


def health(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", ROOT / "docker/healthcheck.py", *arguments], capture_output=True, text=True, check=False
    )


def test_the_health_check_tells_ready_from_not_ready_and_absent() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/readyz" else 503)
            self.end_headers()
            self.wfile.write(b"no engine")

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert health(url + "/readyz").returncode == 0
        sick = health(url + "/other")
        server.shutdown()
    assert sick.returncode == 1 and sick.stdout == f"{url}/other: expected 2xx, got 503 no engine\n"
    gone = health(url + "/readyz")
    assert gone.returncode == 1 and "refused" in gone.stdout
    assert health().returncode == 2


def test_the_health_check_of_a_recording_robot(tmp_path: Path) -> None:
    assert "found none" in health("--fresh", str(tmp_path), "60").stdout
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep/episode.mcap.part"
    file.touch()
    assert health("--fresh", str(tmp_path), "60").returncode == 0
    os.utime(file, (time.time() - 100,) * 2)
    old = health("--fresh", str(tmp_path), "60")
    assert old.returncode == 1 and "the newest is 100 s old" in old.stdout


def entrypoint(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", **variables}
    return subprocess.run(
        [ROOT / "docker/entrypoint.sh", *command], env=environment, capture_output=True, text=True, check=False
    )


def test_the_entry_point_reads_secrets_from_files_and_becomes_the_command(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a b$c\n")
    done = entrypoint("sh", "-c", 'printf "%s|%s" "$RECAP_API_KEY" "$1"', "-", "x  y", RECAP_API_KEY_FILE=str(key))
    assert (done.returncode, done.stdout) == (0, "a b$c|x  y")
    assert entrypoint("sh", "-c", 'echo "${RECAP_API_KEY-unset}"').stdout == "unset\n"
    assert entrypoint("sh", "-c", "exit 7").returncode == 7
    empty = tmp_path / "empty"
    empty.touch()
    for wrong in (empty, tmp_path / "absent"):
        refused = entrypoint("echo", "ran", RECAP_ADMIN_KEY_FILE=str(wrong))
        assert refused.returncode == 2 and refused.stdout == ""
        assert f"RECAP_ADMIN_KEY_FILE: expected a readable file with a key, got {wrong}" in refused.stderr


# ---- the steps themselves -------------------------------------------------------------------------------------------


@contextmanager
def built(name: str, wheels: Path | None = None) -> Iterator[tuple[Path, docker.Stage, dict[str, str]]]:
    """An image's last stage in a folder, and the variables of its container. Others may read it, none may write.

    wheels: as filled by scripts/wheels: it is then built from them alone, without a network and with empty caches.
    """
    work = Path(tempfile.mkdtemp(prefix=f"recap-image-{name}-"))
    try:
        root, kept, base = work / "root", work / "kept", work / "base"
        kept.mkdir()
        subprocess.run([PYTHON, "-m", "venv", base], check=True)
        stages = docker.read(IMAGES[name])
        through = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_", "SSL_", "REQUESTS_"))}
        clean = {"PATH": f"{base}/bin:/usr/bin:/bin", "HOME": str(work), **through}
        clean.setdefault(
            "UV_CACHE_DIR", str(Path.home() / ".cache/uv")
        )  # wheels, so that this does not take the network
        shell, arguments, instead = ["bash", "-c"], dict[str, str](), dict[str, Path]()
        if wheels is not None:
            clean = {"PATH": clean["PATH"], "HOME": str(work)}
            shell = ["unshare", "--map-root-user", "--net", *shell]
            arguments, instead = {"INSTALL_OPTIONS": "--no-index"}, {"docker/wheels": wheels}
        text = docker.script(stages, ROOT, root, kept, arguments, instead)
        done = subprocess.run([*shell, text], env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        shutil.rmtree(kept)
        (work / "tmp").mkdir()
        subprocess.run(["chmod", "-R", "a-w", root / "opt"], check=True)
        refused = run_in(root, ["touch", "/opt/recap/new"], clean)
        assert refused.returncode == 1, "read-only for the container's user"
        yield root, stages[-1], docker.environment(stages[-1], root, base / "bin", {"HOME": str(work / "tmp")})
    finally:
        subprocess.run(["chmod", "-R", "u+w", work], check=True)
        shutil.rmtree(work)


def as_somebody(command: list[str], root: Path) -> list[str]:
    """A container's command below `root`, by a user who cannot write where the file system is read-only."""
    unprivileged = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    return [*unprivileged, *(docker.moved(word, root) for word in command)]


def run_in(root: Path, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        as_somebody(command, root), env=environment, cwd="/", capture_output=True, text=True, check=False
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def installed(root: Path) -> dict[str, str]:
    code = (
        "import json, importlib.metadata as m;"
        "print(json.dumps({d.name.lower().replace('_', '-').replace('.', '-'): d.version for d in m.distributions()}))"
    )
    done = subprocess.run([root / "opt/recap/bin/python", "-I", "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements/full.txt").read_text().splitlines()
    return {name.lower().replace("_", "-").partition("[")[0]: version for name, _, version in
            (line.partition(" ")[0].partition("==") for line in lines if "==" in line)}  # fmt: skip


def check_contents(root: Path) -> None:
    """Only locked versions, what traces need, and nothing that trains."""
    found = installed(root)
    ours = {"recap-client", "recap-stack"}
    assert {"opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"} <= set(found), "the extra `trace`"
    assert {n: v for n, v in found.items() if n not in ours and locked().get(n) != v} == {}
    assert not {"torch", "transformers", "lerobot", "pip", "pytest"} & set(found)
    assert not (root / "opt/recap/lib/python3.12/site-packages/training").exists()


@contextmanager
def container(root: Path, command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(as_somebody(command, root), env=environment, cwd="/")
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def healthy(stage: docker.Stage, root: Path, environment: dict[str, str]) -> str | None:
    """None when the image's own health check passes, else what it says."""
    done = run_in(root, stage.health_command, environment)
    return None if done.returncode == 0 else done.stdout + done.stderr


@contextmanager
def running(name: str, wheels: Path | None = None) -> Iterator[int]:
    """A service from its image's steps, healthy by its own health check, on a port."""
    with built(name, wheels) as (root, stage, environment):
        check_contents(root)
        shutil.copytree(ROOT / "assets/model_repository", root / "models")
        port = free_port()
        environment["RECAP_HEALTH_URL"] = f"http://127.0.0.1:{port}/readyz"
        with container(root, stage.command(f"--{name}-port", str(port)), environment) as process:
            until = time.monotonic() + 120
            while (trouble := healthy(stage, root, environment)) and time.monotonic() < until:
                assert process.poll() is None, f"exit code {process.returncode}"
                time.sleep(0.5)
            assert not trouble
            yield port


@pytest.mark.slow
def test_the_steps_of_policy_and_client_sim_make_a_robot_that_moves() -> None:
    with running("policy") as port, built("client-sim") as (root, stage, environment):
        check_contents(root)
        rollouts = root / "rollouts"
        rollouts.mkdir()
        run = ["run", "--robot", "metaworld", "--task", "drawer-open", "--url", f"ws://127.0.0.1:{port}/act"]
        done = run_in(root, stage.command(*run, "--fast", "--record", str(rollouts)), environment)
        assert done.returncode == 0, done.stderr
        assert len(list(rollouts.rglob("*.mcap"))) == 1
        assert healthy(stage, root, environment) is None


@pytest.mark.slow
def test_the_steps_of_the_critic_image_make_a_service() -> None:
    with running("critic") as port:
        done = subprocess.run(
            [sys.executable, ROOT / "docker/healthcheck.py", f"http://127.0.0.1:{port}/metrics"], check=False
        )
        assert done.returncode == 0


@pytest.mark.slow
def test_the_policy_image_is_built_from_wheels_without_a_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts/wheels", "policy", tmp_path], env={**os.environ, "RECAP_PYTHON": str(PYTHON)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert not list(tmp_path.glob("recap_*")), "ours are built in the image"
    with running("policy", tmp_path) as port:
        assert health(f"http://127.0.0.1:{port}/readyz").returncode == 0


@pytest.mark.slow
@pytest.mark.triton
def test_the_steps_of_the_triton_image_serve_the_models() -> None:
    """The server is that of PyPI in place of NVIDIA's; its python backend takes what the image's steps installed."""
    with built("triton") as (root, stage, environment):
        base = root.parent / "base/bin"
        listed = subprocess.run([base / "python3", "-m", "pip", "freeze"], capture_output=True, text=True, check=True)
        found = dict(line.split("==") for line in listed.stdout.split())
        assert {"numpy", "onnxruntime"} <= set(found)
        assert {n: v for n, v in found.items() if locked().get(n) != v} == {}
        server = triton_environment() / "bin"
        text = (server / "tritonserver").read_text()
        assert f'PATH="{server}:' in text
        (base / "tritonserver").write_text(text.replace(f'PATH="{server}:', f'PATH="{base}:'))
        (base / "tritonserver").chmod(0o755)
        models = triton_repository(root / "models", models=("policy",))
        ports = dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))
        environment |= {"PATH": f"{base}:/usr/bin:/bin", "HOME": str(root.parent / "tmp")}
        environment["RECAP_HEALTH_URL"] = f"http://127.0.0.1:{ports['http']}/v2/health/ready"
        arguments = json.loads(stage.last("CMD") or "[]")
        arguments += [f"--{name}-port={port}" for name, port in ports.items()]
        arguments += [f"--{name}-address=127.0.0.1" for name in ports]
        with container(root, stage.command(*arguments), environment) as process:
            until = time.monotonic() + 120
            while (trouble := healthy(stage, root, environment)) and time.monotonic() < until:
                assert process.poll() is None, f"exit code {process.returncode}"
                time.sleep(0.5)
            assert not trouble
            engine = load_engine(models, "policy", f"triton@grpc://127.0.0.1:{ports['grpc']}")
            inputs = batch(engine, 3)
            ours, theirs = engine.run(inputs), load_engine(models, "policy").run(inputs)
            engine.close()
        assert np.abs(ours["actions"] - theirs["actions"]).max() <= 1e-5


@pytest.mark.slow
def test_the_steps_of_the_training_image_make_its_commands() -> None:
    with built("train") as (root, stage, environment):
        for command in (["recap", "train", "policy", "--help"], ["recap", "export", "--help"], ["torchrun", "--help"]):
            done = run_in(root, stage.command(*command), environment)
            assert done.returncode == 0, done.stderr
