"""Every file under cluster/ is what its reader expects: Serve, KubeRay, the modules and arguments that it names."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from batch_jobs import illustrate
from batch_jobs.pipeline import ENGINE_CPUS
from deployments.application import AppArgs
from deployments.auth import LOOPBACK
from deployments.proxy import CALLBACK, CALLBACK_VARIABLE
from minigpt5.model.sizes import build, counts, serving_gb
from training.storybook.presets import STORYBOOK

FOLDER = Path(__file__).parent.parent.parent / "cluster"
SERVE_CONFIGS = ["serve-storybook.yaml", "serve-minigpt5-7b.yaml", "rayservice.yaml"]
MANIFESTS = ["rayservice.yaml", "rayjob.yaml"]
DEPLOYMENTS = ["Ingress", "VokenGenerator", "DiffusionDecoder"]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def serve_config(name: str) -> dict[str, Any]:
    """The Serve config itself, or the one inside a RayService."""
    (document,) = documents(name)
    return yaml.safe_load(document["spec"]["serveConfigV2"]) if document.get("kind") == "RayService" else document


def manifests() -> Iterator[Any]:
    for name in MANIFESTS:
        for document in documents(name):
            yield pytest.param(document, id=f"{name}:{document['metadata']['name']}")


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    cluster: dict[str, Any] = spec["rayClusterConfig" if manifest["kind"] == "RayService" else "rayClusterSpec"]
    return cluster


def test_every_file_is_tested() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*SERVE_CONFIGS, *MANIFESTS}


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_serve_takes_the_config(name: str) -> None:
    config = ServeDeploySchema.model_validate(serve_config(name))
    (application,) = config.applications
    module, attribute = application.import_path.split(":")
    assert callable(getattr(importlib.import_module(module), attribute))
    AppArgs.model_validate(application.args)
    assert [deployment.name for deployment in application.deployments] == DEPLOYMENTS


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_an_address_that_others_reach_has_keys_and_fronts_have_their_ledger(name: str) -> None:
    config = serve_config(name)
    (application,) = config["applications"]
    assert config["http_options"]["host"] in LOOPBACK or application["args"]["api_keys"]
    assert "num_replicas" not in application["deployments"][0]  # `front_replicas` brings the ledger as well
    if name == "rayservice.yaml":
        cluster = cluster_of(documents(name)[0])
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            (container,) = group["template"]["spec"]["containers"]
            assert {"name": CALLBACK_VARIABLE, "value": CALLBACK} in container["env"]


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_every_engine_scales_by_itself_and_is_given_the_threads_that_it_uses(name: str) -> None:
    (application,) = serve_config(name)["applications"]
    args = AppArgs.model_validate(application["args"])
    _, generator, decoder = application["deployments"]
    for engine, num_threads in ((generator, args.generator_num_threads), (decoder, args.decoder_num_threads)):
        scaling = engine["autoscaling_config"]
        assert 1 <= scaling["min_replicas"] < scaling["max_replicas"]
        assert scaling["target_ongoing_requests"] <= engine["max_ongoing_requests"]
        # A small machine reserves a part of what is used, so that the engines and the front fit two CPUs.
        assert num_threads / 2 <= engine["ray_actor_options"]["num_cpus"] <= num_threads


def test_the_gpus_of_the_published_system_hold_what_its_comments_add_up() -> None:
    text = (FOLDER / "serve-minigpt5-7b.yaml").read_text()
    stated = re.findall(
        r"num_gpus: 1 # of (\d+) GB or more: weights ([\d.]+) GB .*?(?:KV store|a batch) ([\d.]+) GB", text
    )
    assert len(stated) == 2
    sizes = counts(build())
    for (card, weights, rest), (name, kept) in zip(
        stated, (("VokenGenerator", "KV store"), ("DiffusionDecoder", "activations")), strict=True
    ):
        found = serving_gb(sizes, card_bytes=int(card) * 2**30, pictures=8)[name]
        assert (float(weights), float(rest)) == (
            pytest.approx(found["weights"], abs=0.06),
            pytest.approx(found[kept], abs=0.06),
        )
        assert sum(found.values()) < int(card) * 2**30 / 1e9
    # Weights are read in float32 into the host's memory, before they go to the GPU.
    host = [deployment["ray_actor_options"].get("memory") for deployment in deployments_of("serve-minigpt5-7b.yaml")]
    assert host[1] > 4 * (sizes["language model"] + sizes["vision encoder"] + sizes["Q-Former and projection"])
    assert host[2] > 4 * (sizes["UNet"] + sizes["VAE"] + sizes["mapper"])


def deployments_of(name: str) -> list[dict[str, Any]]:
    (application,) = serve_config(name)["applications"]
    deployments: list[dict[str, Any]] = application["deployments"]
    return deployments


def test_two_cpus_have_room_for_one_storybook_replica_of_each_engine() -> None:
    (application,) = serve_config("serve-storybook.yaml")["applications"]
    asked = [deployment["ray_actor_options"]["num_cpus"] for deployment in application["deployments"]]
    assert sum(asked) <= 2 < sum(asked) + min(asked[1:])


@pytest.mark.parametrize("manifest", list(manifests()))
def test_a_manifest_has_what_kuberay_asks_for(manifest: dict[str, Any]) -> None:
    assert manifest["apiVersion"] == "ray.io/v1"
    cluster = cluster_of(manifest)
    assert cluster["rayVersion"] == importlib.metadata.version("ray")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = set()
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        images.add(container["image"])
        assert container["resources"]["limits"] == container["resources"]["requests"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    assert len(images) == 1
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_a_job_names_a_module_and_arguments_that_it_takes() -> None:
    train, batch = (shlex.split(document["spec"]["entrypoint"]) for document in documents("rayjob.yaml"))
    assert train[:3] == ["python", "-m", "training.train"] and train[3] in STORYBOOK
    assert importlib.util.find_spec(train[2])
    workers = int(train[train.index("--workers") + 1])
    assert STORYBOOK[train[3]].batch_size % workers == 0
    assert documents("rayjob.yaml")[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == workers
    assert batch[:3] == ["python", "-m", "batch_jobs.illustrate"]
    options = illustrate.make_parser().parse_args(batch[3:])
    num_cpus = (options.generators[1] + options.decoders[1]) * ENGINE_CPUS
    (group,) = documents("rayjob.yaml")[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert num_cpus <= group["replicas"] * int(container["resources"]["limits"]["cpu"])
