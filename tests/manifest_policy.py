"""What every rendered Kubernetes manifest must keep to, as a list of those that do not."""

import re
from collections.abc import Iterator
from typing import Any

Manifest = dict[str, Any]

SCALERS = ("HorizontalPodAutoscaler", "ScaledObject")


def label(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def pod_templates(manifest: Manifest) -> list[Manifest]:
    """Of a workload; a JobSet has one for each of its jobs."""
    if manifest["kind"] in ("Deployment", "Job"):
        return [manifest["spec"]["template"]]
    if manifest["kind"] == "JobSet":
        return [job["template"]["spec"]["template"] for job in manifest["spec"]["replicatedJobs"]]
    return []


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def violations(manifests: list[Manifest]) -> list[str]:
    """One line for each thing that breaks a rule; empty when all is well."""
    found: list[str] = []
    for manifest in manifests:
        for template in pod_templates(manifest):
            found += (f"{label(manifest)}: {fault}" for fault in _pod(template["spec"]))
            found += (f"{label(manifest)}: {fault}" for fault in _around(template["metadata"]["labels"], manifests))
        if manifest["kind"] == "Deployment":
            found += (f"{label(manifest)}: {fault}" for fault in _deployment(manifest, manifests))
        elif manifest["kind"] == "Service":
            found += (f"{label(manifest)}: {fault}" for fault in _service(manifest, manifests))
        elif manifest["kind"] in SCALERS:
            found += (f"{label(manifest)}: {fault}" for fault in _scaler(manifest, manifests))
    return found


def _pod(pod: Manifest) -> Iterator[str]:
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser", 0) > 0:
        yield "runs as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "no seccomp profile"
    if pod.get("automountServiceAccountToken") is not False:
        yield "holds a token of the cluster"
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares the node's namespaces"
    volumes = {volume["name"] for volume in pod.get("volumes", ())}
    if any("hostPath" in volume for volume in pod.get("volumes", ())):
        yield "mounts a path of the node"
    for container in containers(pod):
        yield from (f"{container['name']}: {fault}" for fault in _container(container, volumes))


def _container(container: Manifest, volumes: set[str]) -> Iterator[str]:
    tag = container["image"].rpartition("/")[2].partition(":")[2]
    if not re.search(r"\d+\.\d+", tag):
        yield f"image {container['image']} is not pinned"
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield "may gain privileges"
    if security.get("readOnlyRootFilesystem") is not True:
        yield "can write to its image"
    if security.get("capabilities") != {"drop": ["ALL"]}:
        yield "keeps capabilities"
    resources = container.get("resources", {})
    for kind in ("requests", "limits"):
        if not {"cpu", "memory"} <= set(resources.get(kind, ())):
            yield f"no {kind} of cpu and memory"
    if missing := {mount["name"] for mount in container.get("volumeMounts", ())} - volumes:
        yield f"mounts {sorted(missing)}, which the pod has not"
    for variable in container.get("env", ()):
        if re.search(r"KEY|PASSWORD|TOKEN|SECRET", variable["name"]) and "value" in variable:
            yield f"{variable['name']} stands in the manifest"


def _selected(selector: Manifest, labels: Manifest) -> bool:
    expressions = selector.get("matchExpressions", ())
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        item["operator"] == "In" and labels.get(item["key"]) in item["values"] for item in expressions
    )


def _around(labels: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    """A network policy in each direction."""
    policies = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
    for direction in ("Ingress", "Egress"):
        if not any(direction in p["policyTypes"] and _selected(p["podSelector"], labels) for p in policies):
            yield f"no network policy for {direction}"


def _deployment(manifest: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    spec, template = manifest["spec"], manifest["spec"]["template"]
    labels = template["metadata"]["labels"]
    if not _selected(spec["selector"], labels):
        yield "its selector does not choose its pods"
    budgets = [m["spec"] for m in manifests if m["kind"] == "PodDisruptionBudget"]
    if not any(_selected(budget["selector"], labels) for budget in budgets):
        yield "no disruption budget"
    if not template["spec"].get("topologySpreadConstraints"):
        yield "is not spread over nodes"
    long_lived = [
        c for c in containers(template["spec"]) if c in template["spec"]["containers"] or "restartPolicy" in c
    ]
    for container in long_lived:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe not in container:
                yield f"{container['name']}: no {probe}"
                continue
            port = container[probe]["httpGet"]["port"]
            if port not in {known["name"] for known in container["ports"]}:
                yield f"{container['name']}: {probe} asks port {port}, which it has not"
    scaled = [m for m in manifests if m["kind"] in SCALERS and m["spec"]["scaleTargetRef"]["name"] == manifest["metadata"]["name"]]  # fmt: skip  # noqa: E501
    if len(scaled) > 1:
        yield f"scaled by {len(scaled)} at once"
    if scaled and "replicas" in spec:
        yield "replicas stand in the manifest and would undo the autoscaler"


def _service(manifest: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    pods = [template for m in manifests for template in pod_templates(m)]
    chosen = [
        pod for pod in pods if _selected({"matchLabels": manifest["spec"]["selector"]}, pod["metadata"]["labels"])
    ]
    if not chosen:
        yield "chooses no pod"
    for pod in chosen:
        known = {port["name"] for container in containers(pod["spec"]) for port in container.get("ports", ())}
        for port in manifest["spec"]["ports"]:
            if port["targetPort"] not in known:
                yield f"port {port['targetPort']} is none of the pod's"


def _scaler(manifest: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    target = manifest["spec"]["scaleTargetRef"]
    if not any(label(m) == f"{target['kind']} {target['name']}" for m in manifests):
        yield f"scales {target['kind']} {target['name']}, which is not there"
