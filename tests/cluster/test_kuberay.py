"""cluster/kuberay/: the pods against Kubernetes' own schemas, Ray's part against the fields that KubeRay's reference tells of."""

from __future__ import annotations

import json
import re
from typing import Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from services import ROOT

from workflows.cluster.check import ROOM
from workflows.storage.lease import WAITS

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install 'mmdistill[dev]'")
FOLDER = ROOT / "cluster/kuberay"
KUBERNETES = "1.34"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: str = ""
    generateName: str = ""


class AuthOptions(Strict):
    mode: Literal["token", "disabled"]
    secretName: str


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: int
    resources: dict[str, dict[str, str]]


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: dict[str, object]


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int


class ClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class JobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    backoffLimit: int
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    rayClusterSpec: ClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


MODELS = {"raycluster": RayCluster, "rayjob": RayJob}


def load(name):
    """Without YAML's aliases: what is changed in one place stays as it is in another."""
    return json.loads(json.dumps(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())))


def cluster_of(given):
    return given["spec"].get("rayClusterSpec", given["spec"])


def check(given):
    """Raises ValidationError of pydantic's for Ray's part, of kubernetes_validate's for a pod's."""
    MODELS[given["kind"].lower()].model_validate(given)
    cluster = cluster_of(given)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_objects_are_valid(name):
    check(load(name))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c: c.update(raVersion="2.60.0"), "raVersion"),
        (lambda c: c["authOptions"].update(mode="tokens"), "authOptions.mode"),
        (lambda c: c["workerGroupSpecs"][0].update(minReplica=1), "minReplica"),
        (lambda c: c["workerGroupSpecs"][1].update(maxReplicas="16"), "maxReplicas"),
        (lambda c: c["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "num-cpus"),
        (lambda c: c["headGroupSpec"]["template"]["spec"].update(container=[]), "container"),
        (lambda c: c["workerGroupSpecs"][1]["template"]["spec"]["containers"][0].update(resource={}), "resource"),
        (lambda c: c["workerGroupSpecs"][1]["template"]["spec"]["tolerations"][0].update(operator=1), "operator"),
    ],
)
def test_a_mistake_is_refused(name, change, word):
    given = load(name)
    change(cluster_of(given))
    with pytest.raises((ValidationError, kubernetes_validate.ValidationError)) as refused:
        check(given)
    assert word in str(refused.value) or word in ".".join(map(str, getattr(refused.value, "path", [])))


def test_the_job_runs_on_the_same_cluster():
    assert load("rayjob")["spec"]["rayClusterSpec"] == load("raycluster")["spec"]


def test_nobody_comes_in_but_ray_and_its_operator():
    given = load("networkpolicy")
    kubernetes_validate.validate(given, KUBERNETES, strict=True)
    assert given["spec"]["policyTypes"] == ["Ingress"]
    allowed = [who for rule in given["spec"]["ingress"] for who in rule["from"]]
    assert all("podSelector" in who and who["podSelector"]["matchLabels"] for who in allowed)
    assert not re.search(
        "ipBlock|LoadBalancer|NodePort|enableIngress|hostNetwork|hostPort", json.dumps(load("raycluster"))
    )


def test_the_token_is_a_secret_and_on():
    cluster = load("raycluster")["spec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "mmdistill-token"}
    for name in MODELS:
        text = (FOLDER / f"{name}.yaml").read_text()
        assert not re.search(r"auth_token:|kind: Secret|\bvalue: .*(key|token|password)", text, re.I)
        assert "secretRef: {name: mmdistill-env, optional: true}" in text


def test_groups_come_with_demand_have_limits_and_may_be_spot():
    cluster = load("raycluster")["spec"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu"}
    for group in groups.values():
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        tolerated = {one["key"] for one in group["template"]["spec"]["tolerations"]}
        assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated
    gpu = groups["gpu"]["template"]["spec"]
    assert "nvidia.com/gpu" in {one["key"] for one in gpu["tolerations"]}
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for group in [cluster["headGroupSpec"], *groups.values()]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert pod["automountServiceAccountToken"] is (group is cluster["headGroupSpec"])


def test_the_head_knows_what_there_can_be():
    cluster = load("raycluster")["spec"]
    limits = {
        g["groupName"]: g["template"]["spec"]["containers"][0]["resources"]["limits"]
        for g in cluster["workerGroupSpecs"]
    }
    most = {g["groupName"]: g["maxReplicas"] for g in cluster["workerGroupSpecs"]}
    told = {v["name"]: v["value"] for v in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]}
    cpus = sum(most[name] * int(limits[name]["cpu"]) for name in most)
    assert json.loads(told[ROOM]) == {"CPU": cpus, "GPU": most["gpu"]}
    assert told[WAITS] == "1"


def test_ray_is_the_version_that_the_image_has():
    pinned = re.search(r"^ray==([\d.]+)", (ROOT / "infra/constraints.txt").read_text(), re.M)
    assert pinned
    assert load("raycluster")["spec"]["rayVersion"] == pinned[1]
