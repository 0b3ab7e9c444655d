"""The Kubernetes manifests as `kubectl kustomize` renders them: schemas, rules, and that they fit each other."""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import tyro
import yaml

from dockerfile_steps import read
from manifest_policy import Manifest, containers, label, pod_templates, violations
from services.common.metrics import CriticMetrics, PolicyMetrics
from services.options import ServeArgs

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("overlays/cpu", "overlays/single-gpu", "overlays/fleet")
FOLDERS = (*OVERLAYS, "jobs")
VERSIONS = ("1.31", "1.36")
pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl 1.27 or newer is not on PATH")
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule", "JobSet"}


@functools.cache
def _rendered(folder: str) -> str:
    done = subprocess.run(["kubectl", "kustomize", ROOT / "k8s" / folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(folder: str) -> list[Manifest]:
    return list(yaml.load_all(_rendered(folder), yaml.CSafeLoader))


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    return next(m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name))


def pod(manifests: list[Manifest], name: str) -> Manifest:
    spec: Manifest = find(manifests, "Deployment", name)["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_fit_the_schemas(folder: str, version: str) -> None:
    manifests = rendered(folder)
    jobs = [  # what a JobSet makes
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, "spec": job["template"]["spec"]}
        for manifest in manifests if manifest["kind"] == "JobSet" for job in manifest["spec"]["replicatedJobs"]
    ]  # fmt: skip
    for manifest in [m for m in manifests if m["kind"] not in CUSTOM] + jobs:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_refuse_what_they_do_not_know() -> None:
    manifest = find(rendered("overlays/cpu"), "Deployment", "policy")
    manifest["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(manifest, VERSIONS[0], strict=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_manifests_keep_the_rules(folder: str) -> None:
    assert violations(rendered(folder)) == []


def test_traces_are_a_component_that_no_overlay_has(tmp_path: Path) -> None:
    for folder in OVERLAYS:
        assert "OTEL_" not in _rendered(folder)
        own = tmp_path / folder
        own.mkdir(parents=True)
        (own / "kustomization.yaml").write_text(
            f"resources: [{os.path.relpath(ROOT / 'k8s' / folder, own)}]\n"
            f"components: [{os.path.relpath(ROOT / 'k8s/components/traces', own)}]\n"
        )
        done = subprocess.run(["kubectl", "kustomize", own], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        manifests: list[Manifest] = list(yaml.load_all(done.stdout, yaml.CSafeLoader))
        assert violations(manifests) == []
        assert find(manifests, "NetworkPolicy", "traces")["spec"]["egress"][0]["ports"][0]["port"] == 4318
        for name in ("policy", "critic"):
            container = pod(manifests, name)["containers"][0]
            variables = {item["name"]: item.get("value") for item in container["env"]}
            assert container["name"] == name and "RECAP_API_KEY" in variables
            assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://otel-collector.monitoring.svc:4318"
            assert variables["OTEL_TRACES_SAMPLER_ARG"] == "0.01"


def policy_container(manifests: list[Manifest]) -> Manifest:
    found: Manifest = pod(manifests, "policy")["containers"][0]
    return found


def without(kind: str) -> Callable[[list[Manifest]], None]:
    def change(manifests: list[Manifest]) -> None:
        manifests[:] = [manifest for manifest in manifests if manifest["kind"] != kind]

    return change


BREAKS: dict[str, Callable[[list[Manifest]], Any]] = {
    "runs as root": lambda m: pod(m, "policy")["securityContext"].pop("runAsNonRoot"),
    "no seccomp profile": lambda m: pod(m, "policy")["securityContext"].pop("seccompProfile"),
    "holds a token of the cluster": lambda m: pod(m, "policy").pop("automountServiceAccountToken"),
    "shares the node's namespaces": lambda m: pod(m, "policy").update(hostNetwork=True),
    "mounts a path of the node": lambda m: pod(m, "policy")["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "is not pinned": lambda m: policy_container(m).update(image="registry.example.org/recap-policy:latest"),
    "may gain privileges": lambda m: policy_container(m)["securityContext"].pop("allowPrivilegeEscalation"),
    "can write to its image": lambda m: policy_container(m)["securityContext"].pop("readOnlyRootFilesystem"),
    "keeps capabilities": lambda m: policy_container(m)["securityContext"].pop("capabilities"),
    "no limits of cpu and memory": lambda m: policy_container(m)["resources"]["limits"].pop("memory"),
    "mounts ['gone'], which the pod has not": lambda m: policy_container(m)["volumeMounts"].append({"name": "gone"}),
    "RECAP_API_KEY stands in the manifest": lambda m: policy_container(m)["env"].append(
        {"name": "RECAP_API_KEY", "value": "x"}
    ),
    "no network policy for Ingress": without("NetworkPolicy"),
    "no disruption budget": without("PodDisruptionBudget"),
    "is not spread over nodes": lambda m: pod(m, "policy").pop("topologySpreadConstraints"),
    "no readinessProbe": lambda m: policy_container(m).pop("readinessProbe"),
    "asks port https, which it has not": lambda m: policy_container(m)["livenessProbe"]["httpGet"].update(port="https"),
    "replicas stand in the manifest": lambda m: find(m, "Deployment", "policy")["spec"].update(replicas=3),
    "chooses no pod": lambda m: find(m, "Service", "policy")["spec"].update(selector={"app": "x"}),
    "is none of the pod's": lambda m: find(m, "Service", "policy")["spec"]["ports"][0].update(targetPort="grpc"),
    "scales Deployment policy, which is not there": without("Deployment"),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_the_rules_see_a_breach(fault: str) -> None:
    manifests = rendered("overlays/cpu")
    BREAKS[fault](manifests)
    assert any(fault in found for found in violations(manifests))


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_options_of_the_services_are_those_they_take(folder: str) -> None:
    manifests = rendered(folder)
    for name in ("policy", "critic"):
        container = pod(manifests, name)["containers"][0]
        command = read(ROOT / f"docker/{name}.Dockerfile")[-1].command(*container["args"])
        args = tyro.cli(ServeArgs, args=command[3:])
        mounts = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
        assert args.what == name and args.models in mounts and args.keys is not None and args.keys.parent in mounts
        port = args.policy_port if name == "policy" else args.critic_port
        assert [p["containerPort"] for p in container["ports"]] == [port]
        assert (args.engine == "triton") == (folder != "overlays/cpu")


def test_a_replica_is_warm_before_it_takes_robots() -> None:
    manifests = rendered("overlays/fleet")
    deployment = find(manifests, "Deployment", "policy")["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert deployment["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/readyz"
    initial = deployment["template"]["spec"]["initContainers"]
    assert [container["name"] for container in initial] == ["models", "triton"], "Triton reads what is copied before"
    assert initial[1]["restartPolicy"] == "Always"


def test_shared_memory_and_models_are_one_for_policy_and_triton() -> None:
    for folder in ("overlays/single-gpu", "overlays/fleet"):
        spec = pod(rendered(folder), "policy")
        both = [c for c in containers(spec) if c["name"] in ("policy", "triton")]
        for path in ("/dev/shm", "/models"):
            names = {mount["name"] for c in both for mount in c["volumeMounts"] if mount["mountPath"] == path}
            assert len(both) == 2 and len(names) == 1, (folder, path)
        assert spec["securityContext"]["runAsUser"] > 0 and not any("runAsUser" in c["securityContext"] for c in both)


@pytest.mark.parametrize("folder", OVERLAYS)
def test_monitors_choose_services_and_give_the_jobs_of_the_rules(folder: str) -> None:
    manifests = rendered(folder)
    jobs = set()
    for monitor in (m for m in manifests if m["kind"] == "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        chosen = [m for m in manifests if m["kind"] == "Service" and wanted.items() <= m["metadata"]["labels"].items()]
        assert len(chosen) == 1, label(monitor)
        for endpoint in monitor["spec"]["endpoints"]:
            assert endpoint["port"] in {port["name"] for port in chosen[0]["spec"]["ports"]}
            jobs.add(endpoint["relabelings"][0]["replacement"])
    targets = yaml.safe_load_all(
        "\n---\n".join(p.read_text() for p in (ROOT / "deploy/observability/targets").glob("*"))
    )
    known = {target["labels"]["job"] for file in targets for target in file}
    assert jobs == known - (set() if folder != "overlays/cpu" else {"triton"})


def test_the_autoscaler_asks_for_metrics_that_the_policy_has() -> None:
    families = {family.name for metrics in (PolicyMetrics(), CriticMetrics()) for family in metrics.registry.collect()}
    triggers = find(rendered("overlays/fleet"), "ScaledObject", "policy")["spec"]["triggers"]
    asked = {name for trigger in triggers for name in re.findall(r"recap_\w+", trigger["metadata"]["query"])}
    assert asked == {"recap_sessions", "recap_act_queue_depth"} and asked <= families


def loaded(script: str) -> ModuleType:
    loader = SourceFileLoader(script, str(ROOT / "scripts" / script))
    spec = spec_from_loader(script, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_rules_of_the_cluster_are_those_of_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert loaded("k8s-rules").main(["--check"]) == 0, capsys.readouterr().out


def test_custom_resources_are_compared_with_definitions(tmp_path: Path) -> None:
    definition = {
        "kind": "CustomResourceDefinition",
        "spec": {
            "group": "keda.sh",
            "names": {"kind": "ScaledObject"},
            "versions": [
                {
                    "name": "v1alpha1",
                    "schema": {
                        "openAPIV3Schema": {
                            "properties": {
                                "spec": {"type": "object", "properties": {"maxReplicaCount": {"type": "string"}}}
                            }
                        }
                    },
                }
            ],
        },
    }
    file = tmp_path / "crd.yaml"
    file.write_text(yaml.safe_dump(definition))
    crds = loaded("k8s-crds")
    found = "\n".join(crds.faults(rendered("overlays/fleet"), crds.schemas([file])))
    assert "ScaledObject policy: $.spec.maxReplicaCount: 64 is not of type 'string'" in found
    assert "'pollingInterval'" in found, "fields without a definition are refused"
    assert "ServiceMonitor policy: expected a definition of monitoring.coreos.com/v1 ServiceMonitor" in found


def test_jobs_run_commands_of_the_training_image() -> None:
    from recap_model.cli import COMMANDS

    for manifest in rendered("jobs"):
        for template in pod_templates(manifest):
            for container in template["spec"]["containers"]:
                words = " ".join(container["args"]).split()
                start = words.index("recap") if "recap" in words else words.index("recap_model.cli")
                assert words[start + 1] in COMMANDS or " ".join(words[start + 1 : start + 3]) in COMMANDS
                assert container["image"].endswith("/recap-train:0.1.0")
