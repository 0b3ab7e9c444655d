"""docker-compose.yml: valid, whole, and as closed as docs/deploy.md says."""

import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from dockerfile_steps import read
from services.common.keys import read_keys
from services.options import ServeArgs

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROFILES = ("cpu", "gpu")


def of(profile: str) -> dict[str, dict[str, Any]]:
    return {name: service for name, service in SERVICES.items() if profile in service["profiles"]}


def names_of(service: dict[str, Any], network: str) -> set[str]:
    networks = service["networks"]
    return set((networks[network] or {}).get("aliases", ())) if isinstance(networks, dict) else set()


def filled(text: str) -> str:
    """A path with the defaults of its variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_the_file_fits_the_compose_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, ROOT / "docker-compose.yml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_traces_are_off_and_can_be_turned_on_from_outside() -> None:
    """By every process of ours that makes them."""
    for name, service in SERVICES.items():
        if not str(service["image"]).startswith(("recap-policy", "recap-critic", "recap-client")):
            continue
        assert filled(service["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]) == "", name
        assert filled(service["environment"]["OTEL_TRACES_SAMPLER"]) == "parentbased_always_on", name


def test_grafana_knows_how_often_prometheus_looks() -> None:
    """Else $__rate_interval is made for another interval, and pictures have gaps."""
    sources = yaml.safe_load((ROOT / "docker/grafana/datasources.yml").read_text())["datasources"]
    config = yaml.safe_load((ROOT / "deploy/observability/prometheus.yml").read_text())
    assert [source["jsonData"]["timeInterval"] for source in sources] == [config["global"]["scrape_interval"]]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_is_whole(profile: str) -> None:
    services = of(profile)
    networks = ("robots", "monitoring", "engines")
    aliases = {a for s in services.values() for n in networks if n in s["networks"] for a in names_of(s, n)}
    reached = set(services) | aliases
    expected = {"policy", "critic", "prometheus", "alertmanager", "grafana"}
    expected |= {"triton"} if profile == "gpu" else set()
    assert expected <= reached and any(name.startswith("robot") for name in services)
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= set(services), name
        assert service.get("ipc", "").removeprefix("service:") in {"", "shareable", *services}, name
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"]), name
        assert set(service["networks"]) <= set(COMPOSE["networks"]), name


def test_the_cpu_profile_needs_no_gpu() -> None:
    assert not any("deploy" in service or "triton" in str(service) for name, service in of("cpu").items()
                   if name != "prometheus")  # fmt: skip
    mounts = [mount.split(":")[-2] for mount in SERVICES["prometheus"]["volumes"]]
    assert not any("targets" in path and "recap.yml" not in path for path in mounts), "no Triton to ask"


@pytest.mark.parametrize("name", SERVICES)
def test_containers_are_closed(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert int(filled(service["user"]).partition(":")[0]) > 0
    assert {"mem_limit", "cpus", "pids_limit", "restart"} <= set(service)
    assert not service.get("privileged") and service.get("network_mode") is None
    for port in service.get("ports", ()):
        assert port.startswith("127.0.0.1:"), port
    tag = service["image"].rpartition("/")[2].partition(":")[2]
    assert re.search(r"\d+\.\d+", tag), service["image"]
    for variable, value in service.get("environment", {}).items():
        if re.search(r"KEY|PASSWORD|TOKEN|SECRET", variable):
            assert value.startswith("/run/secrets/"), f"{variable}: secrets come by file"


@pytest.mark.parametrize("name", SERVICES)
def test_everything_is_watched(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        dockerfile = ROOT / service["build"]["dockerfile"]
        assert "HEALTHCHECK --interval" in dockerfile.read_text()
        assert f"{dockerfile.name.removesuffix('.Dockerfile')}:" in service["image"]
    else:
        assert service["healthcheck"]["test"]


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_exists_or_is_made(name: str) -> None:
    made = {Path("runs/compose") / sub for sub in ("rollouts", "prometheus", "alertmanager", "keys")}
    for mount in SERVICES[name].get("volumes", ()):
        source, _, rest = filled(mount).partition(":")
        path = Path(source)
        assert path in made or ((ROOT / path).exists() and rest.endswith(":ro")), mount


def test_the_options_of_the_services_are_those_they_take() -> None:

    for name in ("policy", "critic", "policy-gpu", "critic-gpu"):
        service = SERVICES[name]
        command = read(ROOT / service["build"]["dockerfile"])[-1].command(*service["command"])
        assert command[1:3] == ["recap", "serve"]
        args = tyro.cli(ServeArgs, args=command[3:])
        assert (args.what, args.host, args.models) == (name.partition("-")[0], "0.0.0.0", Path("/models"))
        assert args.keys == Path("/run/keys/keys.jsonl")
        assert args.engine == ("triton" if name.endswith("gpu") else "onnxruntime")


def test_triton_is_out_of_reach_of_robots() -> None:
    assert COMPOSE["networks"]["engines"]["internal"] is True
    assert "robots" not in SERVICES["triton"]["networks"] and "ports" not in SERVICES["triton"]


def test_set_up_makes_what_is_mounted_and_keeps_what_is_there(tmp_path: Path) -> None:
    state = tmp_path / "state"
    set_up = [ROOT / "scripts/compose-setup", state]
    first = subprocess.run(set_up, capture_output=True, text=True, check=True)
    files = {path.name: path.read_text() for path in (state / "secrets").iterdir()}
    assert set(files) == {Path(filled(secret["file"])).name for secret in COMPOSE["secrets"].values()}
    assert read_keys(state / "keys/keys.jsonl") == {}
    keys = set(files.values())
    assert len(keys) == 4 and all(re.fullmatch(r"[0-9a-f]{64}", key) for key in keys)
    assert not any(key in first.stdout + first.stderr for key in keys)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (state / "secrets").iterdir()} == {0o600}
    subprocess.run(set_up, check=True)
    assert {path.name: path.read_text() for path in (state / "secrets").iterdir()} == files
    assert {path.name for path in state.iterdir()} == {"secrets", "keys", "rollouts", "prometheus", "alertmanager"}
