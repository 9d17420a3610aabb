"""Every file of cluster/kubernetes: schemas, hardware, and what the files name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

from deployments.application import AppArgs
from deployments.observability.__main__ import make_files
from minigpt5.model.sizes import build as build_model
from minigpt5.model.sizes import counts, serving_gb
from tests.cluster.test_image import ENVIRONMENT, WORKDIR, copied
from tests.cluster.test_serve_configs import application, dry_build, overridden
from tests.helpers.cluster_files import (
    BUILDS,
    FILES,
    FOLDER,
    GB,
    GIB,
    GPU,
    IMAGES,
    KUBERNETES,
    PORTS,
    SERVICES,
    VERSION,
    each_applied,
    each_build,
    each_service,
    of_kind,
    pods,
    published_tables,
    ray_cluster,
)
from tests.helpers.manifests import Manifest, build, errors_of
from tests.test_docs import TEXTS

DRAIN_MARGIN_S = 10
"""Between the end of a front's streams and the kill of its pod: the grace of Kubernetes without any setting."""

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
    rows = re.findall(r"^ +(VokenGenerator|DiffusionDecoder|stage \d) .* ([\d.]+)$", published_tables(), flags=re.M)
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


@each_service
def test_pods_outlive_the_drain_of_their_fronts(name: str, tmp_path: Path) -> None:
    one = application(Path(name).name)
    deployments = dry_build(AppArgs.model_validate(one["args"]), tmp_path)
    for config in one.get("deployments", ()):
        deployments[config["name"]] = overridden(deployments[config["name"]], config)
    drain_s = max(each._deployment_config.graceful_shutdown_timeout_s for each in deployments.values())
    assert drain_s == AppArgs.model_validate(one["args"]).max_wait_s
    workers = [pod for pod in pods(name) if pod.ray_labels]
    assert workers
    for pod in workers:
        env = {each["name"]: each["value"] for each in pod.container["env"]}
        drains_s = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drain_s + DRAIN_MARGIN_S <= drains_s, pod.name
        assert drains_s + DRAIN_MARGIN_S <= pod.spec["terminationGracePeriodSeconds"], pod.name
    (service,) = of_kind(name, "RayService")
    upgrade = service["spec"]["upgradeStrategy"].get("clusterUpgradeOptions")
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= drain_s
    assert upgrade is None or upgrade["intervalSeconds"] >= drain_s


def test_no_two_clusters_have_one_head_service() -> None:
    """KubeRay names it after the RayService or the RayCluster, and the workers of both would join whichever has it."""
    of_services = {of_kind(name, "RayService")[0]["metadata"]["name"] for name in SERVICES}
    (cluster,) = of_kind("raycluster", "RayCluster")
    assert cluster["metadata"]["name"] not in of_services


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
