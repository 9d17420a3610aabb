"""Who reaches what in cluster/kubernetes, with which rights, and what stays."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.helpers.cluster_files import (
    APPLIED,
    BUILDS,
    JOBS,
    KUBERNETES,
    PORTS,
    each_applied,
    each_service,
    of_kind,
    pods,
    ray_cluster,
)
from tests.helpers.manifests import Manifest
from tests.test_docs import TEXTS


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def lets_in(client: dict[str, str] | None, port: int) -> bool:
    """Whether the network policy lets a client with these labels reach a port. None: from outside."""
    (policy,) = of_kind("common", "NetworkPolicy")
    for rule in policy["spec"]["ingress"]:
        is_from = "from" not in rule or (
            client is not None and any(matches(peer["podSelector"], client) for peer in rule["from"])
        )
        if is_from and ("ports" not in rule or any(each["port"] == port for each in rule["ports"])):
            return True
    return False


@each_applied
def test_strangers_reach_the_http_port_and_no_port_of_ray(name: str) -> None:
    (policy,) = of_kind("common", "NetworkPolicy")
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    operator, prometheus = {"app.kubernetes.io/name": "kuberay-operator"}, {"app.kubernetes.io/name": "prometheus"}
    for pod in pods(name):
        assert matches(policy["spec"]["podSelector"], pod.labels)
        assert lets_in(pod.labels, 12345)
    for stranger in (None, {}, {"app": "other"}):
        reached = {port for port in (*PORTS.values(), 10001, 52365, 12345) if lets_in(stranger, port)}
        assert reached == {PORTS["serve"]}
    assert lets_in(operator, PORTS["dashboard"]) and not lets_in(operator, PORTS["gcs"])
    assert lets_in(prometheus, PORTS["metrics"]) and not lets_in(prometheus, PORTS["dashboard"])


def test_prometheus_scrapes_every_pod_of_ray() -> None:
    (monitor,) = of_kind("monitoring", "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for name in APPLIED:
        for pod in pods(name):
            if ray_cluster(name) and pod.name != "redis":
                assert matches(monitor["spec"]["selector"], pod.labels)
                ports = [port for each in pod.spec["containers"] for port in each.get("ports", ())]
                assert {"name": endpoint["port"], "containerPort": PORTS["metrics"]} in ports


def test_pods_reach_the_name_servers_of_usual_clusters() -> None:
    (policy,) = of_kind("common", "NetworkPolicy")
    (names,) = (rule for rule in policy["spec"]["egress"] if {"protocol": "UDP", "port": 53} in rule.get("ports", ()))
    assert {(each["protocol"], each["port"]) for each in names["ports"]} == {
        (protocol, port) for protocol in ("UDP", "TCP") for port in (53, 5353)
    }
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in names["to"]


def test_ports_of_other_stores_and_collectors_are_opened_by_a_policy_that_adds_to_the_first() -> None:
    (first,), (more,) = of_kind("common", "NetworkPolicy"), of_kind("egress", "NetworkPolicy")
    assert more["metadata"]["name"] != first["metadata"]["name"]
    assert more["spec"]["podSelector"] == first["spec"]["podSelector"]
    assert more["spec"]["policyTypes"] == ["Egress"]  # what comes in stays as it was

    def ports(policy: Manifest) -> set[int]:
        return {port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", ())}

    assert {9000, 4318} <= ports(more) and not ports(more) & ports(first)
    assert {443, 6443} < ports(first)


@each_applied
def test_nothing_is_open_to_the_outside_by_its_service(name: str) -> None:
    assert all(service["spec"]["type"] == "ClusterIP" for service in of_kind(name, "Service"))
    cluster = ray_cluster(name)
    if cluster:
        assert (
            cluster["headGroupSpec"]["serviceType"] == "ClusterIP" and "enableIngress" not in cluster["headGroupSpec"]
        )
        assert cluster["authOptions"] == {"mode": "token", "secretName": "minigpt5-ray-token"}


@each_applied
def test_a_pod_has_no_rights_that_it_does_not_use(name: str) -> None:
    for pod in pods(name):
        security, container = pod.spec["securityContext"], pod.container["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["readOnlyRootFilesystem"] and not container["allowPrivilegeEscalation"]
        assert container["capabilities"] == {"drop": ["ALL"]}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)
        assert not [volume for volume in pod.spec.get("volumes", ()) if "hostPath" in volume]
        # The head's autoscaler asks Kubernetes for nodes; the others ask for nothing.
        assert pod.name == "head" or pod.spec["automountServiceAccountToken"] is False


@each_service
def test_disruption_budgets_keep_the_head_and_a_generator(name: str) -> None:
    kept = {}
    for budget in of_kind(name, "PodDisruptionBudget"):
        assert isinstance(budget["spec"]["minAvailable"], int)  # all that works for pods of a RayCluster
        kept[budget["metadata"]["name"]] = {
            pod.name for pod in pods(name) if matches(budget["spec"]["selector"], pod.labels)
        }
    assert kept == {"minigpt5-head": {"head"}, "minigpt5-generators": {"generators"}}


@each_service
def test_disruption_budgets_leave_pods_of_jobs_and_clusters_alone(name: str) -> None:
    others = [pod for other in (*JOBS, "raycluster", "prepare") for pod in pods(other)]
    assert {"head", "workers", "pod"} == {pod.name for pod in others}
    for budget in of_kind(name, "PodDisruptionBudget"):
        assert not [pod for pod in others if matches(budget["spec"]["selector"], pod.labels)]


def test_the_head_that_may_die_finds_redis() -> None:
    cluster = ray_cluster("overlays/fault-tolerant")
    assert cluster
    options = cluster["gcsFaultToleranceOptions"]
    (service,) = of_kind("overlays/fault-tolerant", "Service")
    (redis,) = (pod for pod in pods("overlays/fault-tolerant") if pod.name == "redis")
    (port,) = service["spec"]["ports"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{port['port']}"
    assert service["spec"]["selector"].items() <= redis.labels.items()
    assert redis.container["env"][0]["valueFrom"] == options["redisPassword"]["valueFrom"]


def test_only_common_has_claims_and_nothing_includes_it() -> None:
    assert {each["metadata"]["name"] for each in of_kind("common", "PersistentVolumeClaim")} == {
        "minigpt5-data",
        "minigpt5-stories",
    }
    for name in BUILDS:
        resources = yaml.safe_load((KUBERNETES / name / "kustomization.yaml").read_text())["resources"]
        assert not [path for path in resources if (KUBERNETES / name / path).resolve() == KUBERNETES / "common"], name
        if name != "common":  # `kubectl delete -k` deletes what the build has
            assert not of_kind(name, "PersistentVolumeClaim"), name
        if name not in ("common", "egress"):
            assert not of_kind(name, "NetworkPolicy"), name


def test_common_is_applied_first() -> None:
    applied = re.findall(r"kubectl apply -k cluster/kubernetes/(\S+)", TEXTS["docs/kubernetes.md"])
    assert applied[0] == "common" and applied.count("common") == 1
