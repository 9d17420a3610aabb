"""Every file of cluster/kubernetes: schemas, and what the files name. `docs/kubernetes.md` has the commands."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

from batch_jobs import illustrate
from batch_jobs.pipeline import ENGINE_CPUS
from deployments.application import AppArgs
from deployments.observability.__main__ import make_files
from minigpt5.model.sizes import build as build_model
from minigpt5.model.sizes import counts, print_tables, serving_gb
from tests.cluster.test_image import ENVIRONMENT, WORKDIR, copied
from tests.cluster.test_serve_configs import application, dry_build, overridden
from tests.helpers.manifests import Manifest, build, errors_of
from tests.test_docs import TEXTS, blocks, parse_all
from training.presets import PUBLISHED
from training.train import make_parser

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "cluster"
KUBERNETES = FOLDER / "kubernetes"
FILES = [path for path in sorted(FOLDER.rglob("*")) if path.is_file()]
BUILDS = {
    path.parent.relative_to(KUBERNETES).as_posix(): build(path.parent)
    for path in sorted(KUBERNETES.rglob("kustomization.yaml"))
}
SERVICES = [name for name in BUILDS if name.startswith("overlays/")]
JOBS = [name for name in BUILDS if name.startswith("jobs/") and name != "jobs/base"]
APPLIED = [*SERVICES, *JOBS, "prepare", "raycluster"]
"""What is applied after `common`."""
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
IMAGES = {f"minigpt5:{VERSION}-cpu", f"minigpt5:{VERSION}-gpu", "redis:7.2"}
GB, GIB = 1e9, 2**30
PORTS = {
    "gcs": ray_constants.DEFAULT_PORT,
    "dashboard": ray_constants.DEFAULT_DASHBOARD_PORT,
    "metrics": 8080,  # KubeRay starts Ray with --metrics-export-port=8080
    "serve": 8000,
    "redis": 6379,
}
GPU = "nvidia.com/gpu"
each_build = pytest.mark.parametrize("name", BUILDS)
each_applied = pytest.mark.parametrize("name", APPLIED)
each_service = pytest.mark.parametrize("name", SERVICES)


@dataclass(frozen=True, kw_only=True)
class PodTemplate:
    """A pod that a build asks for, with the labels that KubeRay adds."""

    name: str
    labels: dict[str, str]
    spec: dict[str, Any]
    ray_labels: dict[str, str]
    """Of the Ray node in it."""
    max_replicas: int = 1

    @property
    def container(self) -> dict[str, Any]:
        (container,) = self.spec["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def limits(self) -> dict[str, float]:
        """CPUs, GPUs and bytes."""
        limits = self.container["resources"]["limits"]
        return {"cpu": float(limits["cpu"]), "memory": to_bytes(limits["memory"]), GPU: limits.get(GPU, 0)}


def to_bytes(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi")) * GIB


def of_kind(name: str, *kinds: str) -> list[Manifest]:
    return [manifest for manifest in BUILDS[name] if manifest["kind"] in kinds]


def ray_cluster(name: str) -> dict[str, Any] | None:
    fields = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec", "RayCluster": None}
    for manifest in of_kind(name, *fields):
        field = fields[manifest["kind"]]
        cluster: dict[str, Any] = manifest["spec"][field] if field else manifest["spec"]
        return cluster
    return None


def pods(name: str) -> Iterator[PodTemplate]:
    for manifest in of_kind(name, "Pod"):
        yield PodTemplate(name="pod", labels=manifest["metadata"]["labels"], spec=manifest["spec"], ray_labels={})
    for manifest in of_kind(name, "StatefulSet"):
        template = manifest["spec"]["template"]
        yield PodTemplate(name="redis", labels=template["metadata"]["labels"], spec=template["spec"], ray_labels={})
    cluster = ray_cluster(name)
    if cluster:
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            template, labels = group["template"], group.get("labels", {})
            kind = "worker" if "groupName" in group else "head"
            yield PodTemplate(
                name=group.get("groupName", "head"),
                labels={**template["metadata"]["labels"], **labels, "ray.io/node-type": kind},
                spec=template["spec"],
                ray_labels=labels,
                max_replicas=group.get("maxReplicas", 1),
            )


# Schemas


@each_build
def test_the_objects_are_what_kubernetes_and_its_operators_take(name: str) -> None:
    assert BUILDS[name]
    for manifest in BUILDS[name]:
        assert not errors_of(manifest), manifest["metadata"]["name"]


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        ("overlays/autoscaled", "RayService", "spec/rayClusterConfig/gcsFaultTolerance"),
        ("overlays/autoscaled", "RayService", "spec/upgradeStrategy/clusterUpgradeOptions/step"),
        ("overlays/autoscaled", "RayService", "spec/rayClusterConfig/headGroupSpec/template/spec/volume"),
        ("overlays/autoscaled", "PodDisruptionBudget", "spec/min"),
        ("jobs/align", "RayJob", "spec/backoff"),
        ("common", "NetworkPolicy", "spec/ingres"),
        ("raycluster", "RayCluster", "spec/serveConfigV2"),
        ("monitoring", "PodMonitor", "spec/podSelector"),
        ("monitoring", "PrometheusRule", "spec/rules"),
    ],
)
def test_an_unknown_field_is_refused(name: str, kind: str, path: str) -> None:
    manifest = next(each for each in build(KUBERNETES / name) if each["kind"] == kind)
    *keys, last = path.split("/")
    place = manifest
    for key in keys:
        place = place[key]
    place[last] = 1
    (error,) = errors_of(manifest)
    assert f"'{last}' was unexpected" in error


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not here")
@each_build
def test_kubectl_builds_the_same(name: str) -> None:
    command = ["kubectl", "kustomize", str(KUBERNETES / name)]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def order(manifest: Manifest) -> tuple[str, str]:
        return manifest["kind"], manifest["metadata"]["name"]

    assert sorted(yaml.safe_load_all(made), key=order) == sorted(BUILDS[name], key=order)


def test_every_file_is_a_part_of_something_that_is_tested() -> None:
    used = {KUBERNETES / name / "kustomization.yaml" for name in BUILDS}
    for path in list(used):
        kustomization = yaml.safe_load(path.read_text())
        used |= {path.parent / name for name in kustomization["resources"]}
        used |= {path.parent / patch["path"] for patch in kustomization.get("patches", ()) if "path" in patch}
    others = {"Dockerfile", "Dockerfile.dockerignore", "ray-up.yaml", "serve-storybook.yaml", "serve-minigpt5-7b.yaml"}
    others |= {name for name in make_files() if not name.startswith("kubernetes/")}
    assert {path for path in FILES} == {path for path in used if path.is_file()} | {FOLDER / name for name in others}


def test_ray_up_takes_its_file() -> None:
    config = yaml.safe_load((FOLDER / "ray-up.yaml").read_text())
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert config["docker"]["image"] == f"minigpt5:{VERSION}-gpu"
    assert sum(each.get("max_workers", 0) for each in types.values()) <= config["max_workers"]
    assert {name for name, each in types.items() if "InstanceMarketOptions" in each["node_config"]} == {"decoders"}
    assert types["decoders"]["labels"]["ray.io/market-type"] == "spot"
    nodes = [each for each in types.values() if "labels" in each]
    for name in ("autoscaled", "serve-minigpt5-7b.yaml"):  # the same places as on Kubernetes
        free = {id(node): node["resources"]["CPU"] for node in nodes}
        for deployment in application(name)["deployments"]:
            options = deployment["ray_actor_options"]
            chosen = [node for node in nodes if options["label_selector"].items() <= node["labels"].items()]
            assert chosen, deployment["name"]
            for node in chosen:
                assert options.get("num_gpus", 0) <= node["resources"]["GPU"]
                free[id(node)] -= options["num_cpus"]
        assert all(cpus >= 1 for cpus in free.values()), name  # for Ray itself, beside one replica of each
    assert "RAY_AUTH_MODE=token" in " ".join(config["docker"]["run_options"])
    assert config["provider"]["use_internal_ips"]


# Hardware


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_a_file_begins_with_the_hardware_that_it_is_for(path: Path) -> None:
    if path.name in ("Dockerfile.dockerignore", "dashboard.json"):
        pytest.skip("its format has no place for it")
    assert "Hardware: " in header(path)


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:first])


@each_applied
def test_every_pod_fits_a_node_that_the_header_names(name: str) -> None:
    text = header(KUBERNETES / name / "kustomization.yaml").partition("Hardware: ")[2]
    if text.startswith("that of "):
        text = text.replace("that of `autoscaled`", header(KUBERNETES / "overlays/autoscaled/kustomization.yaml"))
        text = text.replace("that of raycluster.yaml", header(KUBERNETES / "raycluster/raycluster.yaml"))
    nodes = re.findall(r"(\d+) CPUs?(?:,| and) (\d+) GiB", text)
    assert nodes
    for pod in pods(name):
        cpus, memory = pod.limits["cpu"], pod.limits["memory"] / GIB
        assert any(cpus <= int(node) and memory <= int(gib) for node, gib in nodes), pod.name
        assert pod.container["resources"]["limits"] == pod.container["resources"]["requests"]
        assert not pod.limits[GPU] or "GPU of" in text


def published_gb() -> dict[str, float]:
    """GB of each deployment and stage of the published system, as `python -m minigpt5.published sizes` prints them:
    the first table that has the name."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        print_tables()
    rows = re.findall(r"^ +(VokenGenerator|DiffusionDecoder|stage \d) .* ([\d.]+)$", said.getvalue(), flags=re.M)
    return {name: float(gigabytes) for name, gigabytes in reversed(rows)}


def test_gpus_are_as_large_as_the_published_system_needs() -> None:
    needed = published_gb()
    generator, decoder = needed["VokenGenerator"], needed["DiffusionDecoder"]

    def gpus(path: str) -> list[float]:
        """GB of 1e9 bytes; vendors count in 2**30."""
        return [int(gb) * GIB / GB for gb in re.findall(r"GPUs? of (\d+) GB", header(FOLDER / path))]

    overlays = "kubernetes/overlays"
    store = serving_gb(counts(build_model()), card_bytes=40 * GIB, pictures=8)["VokenGenerator"]
    kept = AppArgs.model_validate(application("one-gpu")["args"]).generator_kv_cache_gib
    assert (
        kept
        and sum(store.values()) - store["KV store"] + kept * GIB / GB + decoder
        <= gpus(f"{overlays}/one-gpu/rayservice.yaml")[0]
    )
    for path in ("one-gpu/kustomization.yaml", "one-gpu/rayservice.yaml"):
        assert gpus(f"{overlays}/{path}")[0] >= generator + decoder
    for path in (f"{overlays}/autoscaled/kustomization.yaml", f"{overlays}/autoscaled/rayservice.yaml"):
        assert gpus(path)[0] >= generator and gpus(path)[1] >= decoder
    assert gpus("serve-minigpt5-7b.yaml")[0] >= generator and gpus("serve-minigpt5-7b.yaml")[1] >= decoder
    assert gpus("ray-up.yaml")[0] >= generator and gpus("ray-up.yaml")[1] >= decoder
    for job, stage in (("align", "stage 1"), ("learn", "stage 2")):
        assert gpus(f"kubernetes/jobs/{job}/kustomization.yaml")[0] >= needed[stage]


@each_service
def test_the_replicas_fit_the_pods_that_their_labels_choose(name: str, tmp_path: Path) -> None:
    one = application(name.removeprefix("overlays/"))
    deployments = dry_build(AppArgs.model_validate(one["args"]), tmp_path)
    for config in one.get("deployments", ()):
        deployments[config["name"]] = overridden(deployments[config["name"]], config)
    groups = [pod for pod in pods(name) if pod.labels.get("ray.io/node-type") == "worker"]
    cpus = gpus = 0.0
    for deployment in deployments.values():
        options = deployment.ray_actor_options
        selector = options.get("label_selector") or {}
        chosen = [pod for pod in groups if selector.items() <= pod.ray_labels.items()]
        assert chosen, deployment.name
        scaling = deployment._deployment_config.autoscaling_config
        most = scaling.max_replicas if scaling else deployment.num_replicas
        cpus, gpus = cpus + most * options["num_cpus"], gpus + most * options.get("num_gpus", 0)
        for pod in chosen:
            assert options["num_cpus"] <= pod.limits["cpu"] and options.get("num_gpus", 0) <= pod.limits[GPU]
            assert options.get("memory", 0) <= pod.limits["memory"] - 2 * GIB  # for Ray itself and the object store
            assert not options.get("num_gpus") or pod.container["image"].endswith("-gpu")
    assert cpus <= sum(pod.max_replicas * pod.limits["cpu"] for pod in groups)
    assert gpus <= sum(pod.max_replicas * pod.limits[GPU] for pod in groups)


@pytest.mark.parametrize("name", ["overlays/autoscaled", "overlays/fault-tolerant"])
def test_decoders_run_on_spot_nodes_and_nothing_else_does(name: str) -> None:
    spot = {pod.name for pod in pods(name) if pod.ray_labels.get("ray.io/market-type") == "spot"}
    assert spot == {"decoders"}
    for pod in pods(name):
        tolerated = {toleration["key"] for toleration in pod.spec.get("tolerations", ())}
        assert ("capacity" in tolerated) == ("nodeSelector" in pod.spec) == (pod.name == "decoders")
        assert (GPU in tolerated) == bool(pod.limits[GPU])
    for config in application(name.removeprefix("overlays/"))["deployments"]:
        selector = config["ray_actor_options"]["label_selector"]
        chosen = {pod.name for pod in pods(name) if selector.items() <= pod.ray_labels.items()}
        assert chosen == {"decoders" if config["name"] == "DiffusionDecoder" else "generators"}


# What the files name


@each_applied
def test_images_volumes_and_probes_exist(name: str) -> None:
    claims = {manifest["metadata"]["name"] for manifest in of_kind("common", "PersistentVolumeClaim")}
    images = set()
    for pod in pods(name):
        container = pod.container
        assert container["image"] in IMAGES
        images |= {container["image"]} - {"redis:7.2"}
        owned = {"state"} if pod.name == "redis" else set()
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes) | owned
        assert {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in volumes.values()
            if len(volume) > 1 and "persistentVolumeClaim" in volume
        } <= claims
        for port in container.get("ports", ()):
            assert port["containerPort"] == PORTS[port["name"]]
        for probe in ("livenessProbe", "readinessProbe"):
            action = container.get(probe, {}).get("httpGet")
            if action and action["port"] == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT:
                assert action["path"] in PUBLIC_EXACT_PATHS  # no token is asked for
            elif action:
                assert (action["path"], action["port"]) == ("/-/healthz", PORTS["serve"])  # of Serve's proxy
    assert len(images) == 1  # a Ray cluster has one version of everything


@each_applied
def test_a_cluster_has_the_version_of_ray_that_is_installed(name: str) -> None:
    cluster = ray_cluster(name)
    assert name == "prepare" or cluster
    if cluster:
        assert cluster["rayVersion"] == importlib.metadata.version("ray")
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # KubeRay hands the pod's CPUs, GPUs and memory to `ray start`; these are the options that files add.
        options = {
            option
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
            for option in group["rayStartParams"]
        }
        assert options <= {"dashboard-host", "num-cpus", "object-store-memory"}


@each_service
def test_the_application_finds_its_folders_in_the_pods(name: str) -> None:
    args = application(name.removeprefix("overlays/"))["args"]
    for pod in pods(name):
        if pod.name == "redis":
            continue
        mounts = {mount["mountPath"]: mount for mount in pod.container["volumeMounts"]}
        assert mounts["/data"]["readOnly"] and args["model"].startswith("/data/models/")
        assert args["storage"] == "/stories" and "readOnly" not in mounts["/stories"]
        assert args["api_keys"] == "/keys/keys.json" and "subPath" not in mounts["/keys"]
        assert {"name": "tmp", "emptyDir": {}} in pod.spec["volumes"] and "/tmp" in mounts
        for value in ENVIRONMENT.values():
            for path in re.findall(r"/[\w/.-]+", value):
                assert path.startswith((f"{WORKDIR}", "/data/", "/tmp/"))


def test_a_preparation_installs_what_the_image_has() -> None:
    (pod,) = pods("prepare")
    (script,) = pod.container["args"]
    (requirements,) = re.findall(r"-r (\S+)", script)
    assert Path(requirements).parent == Path(WORKDIR) and Path(requirements).name in copied()
    (module,) = re.findall(r"python -m ([\w.]+)", script)
    assert importlib.util.find_spec(module)
    (target,) = re.findall(r"--target (\S+)", script)
    assert target in ENVIRONMENT["PYTHONPATH"].split(":")
    environment = ENVIRONMENT | {each["name"]: each["value"] for each in pod.container["env"]}
    (linked,) = re.findall(r"--link (\S+)", script)
    assert linked == ENVIRONMENT["MINIGPT5_MODELS"] and environment["MINIGPT5_MODELS"] == ""
    assert environment["XDG_CACHE_HOME"].startswith("/data/") and environment["HF_HUB_CACHE"].startswith("/data/")
    assert (environment["HF_HUB_OFFLINE"], ENVIRONMENT["HF_HUB_OFFLINE"]) == ("0", "1")
    assert ENVIRONMENT["XDG_CACHE_HOME"].startswith("/tmp/")  # the service fills it
    assert "$HUB_MODELS" in script and "HUB_MODELS" in TEXTS["docs/kubernetes.md"]
    first, *_, touched, last = script.splitlines()
    assert (first, touched, last) == ("rm -f /data/.prepared", "touch /data/.prepared", "sleep infinity")
    assert pod.container["readinessProbe"]["exec"]["command"] == ["test", "-f", "/data/.prepared"]


def test_jobs_name_modules_and_arguments_that_they_take() -> None:
    entrypoints = {name: shlex.split(of_kind(name, "RayJob")[0]["spec"]["entrypoint"]) for name in JOBS}
    assert set(entrypoints) == {f"jobs/{job}" for job in ("align", "learn", "illustrate", "evaluate")}
    assert all(words[:2] == ["python", "-m"] for words in entrypoints.values())
    answers = parse_all([words[2:] for words in entrypoints.values()])
    assert len(answers) == len(JOBS) and all(code == 77 for _, code, _ in answers), answers


@pytest.mark.parametrize("stage", ["align", "learn"])
def test_a_training_job_has_a_pod_for_each_worker(stage: str) -> None:
    (job,) = of_kind(f"jobs/{stage}", "RayJob")
    options = make_parser().parse_args(shlex.split(job["spec"]["entrypoint"])[3:])
    assert options.stage == stage and stage in PUBLISHED
    assert PUBLISHED[stage].batch_size % options.workers == 0
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"] == options.workers
    worker = next(pod for pod in pods(f"jobs/{stage}") if pod.name == "workers")
    assert worker.limits[GPU] == options.gpus
    with contextlib.redirect_stdout(io.StringIO()) as said:
        print_tables()
    sizes = {
        name: int(number.replace(",", ""))
        for name, number in re.findall(r"^  (\w[\w -]+?) +([\d,]+)$", said.getvalue(), flags=re.M)
    }
    names = ("language model", "vision encoder", "Q-Former and projection", "mapper", "UNet", "VAE", "text encoder")
    assert worker.limits["memory"] >= 4 * sum(sizes[name] for name in names) + 8 * GIB  # float32, while it loads


def test_learn_starts_where_align_ended() -> None:
    align, learn = (
        make_parser().parse_args(shlex.split(of_kind(f"jobs/{stage}", "RayJob")[0]["spec"]["entrypoint"])[3:])
        for stage in ("align", "learn")
    )
    assert learn.start == f"{align.out}/model"


def test_a_bulk_job_has_cpus_for_its_engines() -> None:
    (job,) = of_kind("jobs/illustrate", "RayJob")
    options = illustrate.make_parser().parse_args(shlex.split(job["spec"]["entrypoint"])[3:])
    worker = next(pod for pod in pods("jobs/illustrate") if pod.name == "workers")
    num_cpus = (options.generators[1] + options.decoders[1]) * ENGINE_CPUS
    assert num_cpus + 2 <= worker.max_replicas * worker.limits["cpu"]  # two for Ray Data's own tasks


def test_the_driver_that_computes_runs_on_a_worker() -> None:
    (job,) = of_kind("jobs/evaluate", "RayJob")
    worker = next(pod for pod in pods("jobs/evaluate") if pod.name == "workers")
    threads = re.search(r"--threads (\d+)", job["spec"]["entrypoint"])
    assert threads and int(threads[1]) == job["spec"]["entrypointNumCpus"] <= worker.limits["cpu"]


# Security


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


# The data outlives what uses it


def test_only_common_has_claims_and_nothing_includes_it() -> None:
    assert {each["metadata"]["name"] for each in of_kind("common", "PersistentVolumeClaim")} == {
        "minigpt5-data",
        "minigpt5-stories",
    }
    for name in BUILDS:
        resources = yaml.safe_load((KUBERNETES / name / "kustomization.yaml").read_text())["resources"]
        assert not [path for path in resources if (KUBERNETES / name / path).resolve() == KUBERNETES / "common"], name
        if name != "common":  # `kubectl delete -k` deletes what the build has
            assert not of_kind(name, "PersistentVolumeClaim", "NetworkPolicy"), name


def test_common_is_applied_first() -> None:
    applied = re.findall(r"kubectl apply -k cluster/kubernetes/(\S+)", TEXTS["docs/kubernetes.md"])
    assert applied[0] == "common" and applied.count("common") == 1


# The commands of docs/kubernetes.md


def test_the_pages_command_writes_a_registry_into_every_image(tmp_path: Path) -> None:
    (command,) = re.findall("^sed .*$", TEXTS["docs/kubernetes.md"], flags=re.M)
    shutil.copytree(FOLDER, tmp_path / "cluster")
    subprocess.run(["bash", "-ec", f"REGISTRY=registry.internal/team; {command}"], cwd=tmp_path, check=True)

    def images(folder: Path) -> list[str]:
        text = "".join(
            path.read_text() for path in [*sorted(folder.glob("kubernetes/**/*.yaml")), folder / "ray-up.yaml"]
        )
        return re.findall(r"[\w./]*minigpt5:[\w.-]+", text)

    assert images(FOLDER) and set(images(FOLDER)) == IMAGES - {"redis:7.2"}
    assert images(tmp_path / "cluster") == [f"registry.internal/team/{image}" for image in images(FOLDER)]


def secrets_of(name: str) -> set[str]:
    """Secrets that the build's objects name."""
    pattern = r"'secretName': '([\w-]+)'|'secretKeyRef': {[^}]*'name': '([\w-]+)'|'secretRef': {[^}]*'name': '([\w-]+)'"
    return {secret for found in re.findall(pattern, str(BUILDS[name])) for secret in found if secret}


def test_the_commands_of_the_page_fit_the_files() -> None:
    lines = "\n".join(blocks("docs/kubernetes.md", "", "sh", "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.split(" #")[0]) for line in lines if line.startswith(("kubectl ", "docker "))]
    applied = {line[line.index("-k") + 1] for line in words if "-k" in line}
    assert {Path(path).relative_to("cluster/kubernetes").as_posix() for path in applied} <= {"common", *APPLIED}
    created = {line[4] for line in words if line[:4] == ["kubectl", "create", "secret", "generic"]}
    needed = set().union(*(secrets_of(name) for name in APPLIED))
    assert created == needed == {"minigpt5-keys", "minigpt5-ray-token", "minigpt5-redis", "minigpt5-s3"}
    text = TEXTS["docs/kubernetes.md"]
    for key in ("keys.json", "auth_token", "password"):
        assert f"{key}=" in text or f"--from-file={key}" in text or f"/{key}" in text
    built = [line for line in words if line[:2] == ["docker", "build"]]
    tagged = [line[2:] for line in words if line[:2] == ["docker", "tag"]]
    pushed = {line[2] for line in words if line[:2] == ["docker", "push"]}
    assert {image for image, _ in tagged} == IMAGES - {"redis:7.2"}
    assert all(name == f"$REGISTRY/{image}" for image, name in tagged) and pushed == {name for _, name in tagged}
    assert built and all(line[line.index("-f") + 1] == "cluster/Dockerfile" for line in built)
    assert {line[line.index("-t") + 1] for line in built} == IMAGES - {"redis:7.2"}
    for folder in [*SERVICES, *JOBS]:
        assert f"cluster/kubernetes/{folder}" in text or folder.removeprefix("overlays/").removeprefix("jobs/") in text
