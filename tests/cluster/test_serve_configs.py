"""Every Serve config, in a file of its own or inside a RayService, is one that Serve and the application take."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve import Deployment
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.build_app import build_app
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import DeploymentSchema, ServeDeploySchema

from deployments.__main__ import parse_args
from deployments.application import AppArgs, app
from deployments.auth import LOOPBACK, add_key
from deployments.autoscaling.policy import DECODER, GENERATOR, StoryPolicy
from minigpt5.config import default_model_folder
from minigpt5.model.sizes import build as build_model
from minigpt5.model.sizes import counts, serving_gb
from tests.helpers.manifests import build

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "cluster"
OVERLAYS = sorted(path.parent for path in FOLDER.glob("kubernetes/overlays/*/kustomization.yaml"))
FILES = sorted(FOLDER.glob("serve-*.yaml"))
LABELLED = ("Ingress", "Ledger", "VokenGenerator", "DiffusionDecoder")


def read_config(path: Path) -> dict[str, Any]:
    """The Serve config of a file or of an overlay's RayService."""
    if path.is_file():
        config = yaml.safe_load(path.read_text())
    else:
        (service,) = (each for each in build(path) if each["kind"] == "RayService")
        config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert isinstance(config, dict)
    return config


CONFIGS = {path.name: read_config(path) for path in [*FILES, *OVERLAYS]}
each_config = pytest.mark.parametrize("name", CONFIGS)


def application(name: str) -> dict[str, Any]:
    (found,) = CONFIGS[name]["applications"]
    assert isinstance(found, dict)
    return found


def dry_build(args: AppArgs, folder: Path) -> dict[str, Deployment]:
    """The application's deployments as Serve would deploy them, of the shipped model, with keys. Nothing starts."""
    keys = folder / "keys.json"
    if not keys.exists():
        add_key(keys, "alice", per_minute=60, concurrent=8)
    here = {"model": str(default_model_folder()), "storage": str(folder), "api_keys": str(keys)}
    built = build_app(app(args.model_copy(update=here)), name="default")
    return {deployment.name: deployment for deployment in built.deployments}


def overridden(deployment: Deployment, config: dict[str, Any]) -> Deployment:
    """A deployment with the settings of its entry in a config, by Serve's own checks."""
    return deployment.options(**{key: value for key, value in config.items() if key != "name"})


def test_there_are_overlays_and_files() -> None:
    assert {"serve-storybook.yaml", "serve-minigpt5-7b.yaml", "storybook-cpu", "one-gpu", "autoscaled"} < set(CONFIGS)


@each_config
def test_serve_takes_the_config(name: str) -> None:
    (one,) = ServeDeploySchema.model_validate(CONFIGS[name]).applications
    module, attribute = one.import_path.split(":")
    assert getattr(importlib.import_module(module), attribute) is app
    AppArgs.model_validate(one.args)


@each_config
def test_the_application_builds_and_has_every_deployment_that_is_named(name: str, tmp_path: Path) -> None:
    one = application(name)
    deployments = dry_build(AppArgs.model_validate(one["args"]), tmp_path)
    for config in one.get("deployments", ()):
        changed = overridden(deployments[config["name"]], config)
        assert changed.ray_actor_options is not None
        assert config["ray_actor_options"].items() <= changed.ray_actor_options.items()
        assert "num_replicas" not in config  # `front_replicas` brings the ledger as well


@pytest.mark.parametrize("name", ["serve-storybook.yaml", "serve-minigpt5-7b.yaml", "autoscaled", "fault-tolerant"])
def test_replicas_follow_the_story_policy(name: str, tmp_path: Path) -> None:
    """Serve builds the policy of the config with its settings, for engines that the policy knows by their names."""
    (one,) = ServeDeploySchema.model_validate(CONFIGS[name]).applications
    policy = _resolve_policy_callable(AutoscalingPolicy(**(one.autoscaling_policy or {})))
    assert type(policy).__name__ == StoryPolicy.__name__  # Serve unpickles a class of its own
    deployments = dry_build(AppArgs.model_validate(one.args), tmp_path)
    for config in application(name).get("deployments", ()):
        deployments[config["name"]] = overridden(deployments[config["name"]], config)
    scaled = {key for key, found in deployments.items() if found._deployment_config.autoscaling_config}
    assert scaled == {GENERATOR, DECODER}
    limit = sum(deployments[key]._deployment_config.autoscaling_config.max_replicas for key in scaled)
    assert policy.settings.max_cost >= limit


def test_a_setting_that_serve_does_not_know_is_seen(tmp_path: Path) -> None:
    deployments = dry_build(AppArgs(), tmp_path)
    with pytest.raises(ValueError, match="label"):
        DeploymentSchema.model_validate({"name": "Ingress", "ray_actor_options": {"label_selector": {"a b": "!?"}}})
    with pytest.raises(TypeError, match="max_ongoing"):
        overridden(deployments["Ingress"], {"max_ongoing": 5})


def test_the_storybook_file_has_the_settings_of_make_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["deployments"])
    options = parse_args()
    config, one = CONFIGS["serve-storybook.yaml"], application("serve-storybook.yaml")
    assert config["http_options"] == {"host": options.host, "port": options.port}
    args = AppArgs(model=options.model, api_keys=options.api_keys, filters=options.filters)
    named = AppArgs.model_validate(one["args"])
    assert named.model_copy(update={"storage": args.storage}) == args
    assert named.front_replicas == options.fronts
    assert "deployments" not in one  # what it says there would replace `args`, without a word


@pytest.mark.parametrize("name", ["storybook-cpu"])
def test_the_storybook_overlay_leaves_every_default(name: str) -> None:
    assert set(application(name)) == {"name", "route_prefix", "import_path", "args"}
    assert set(application(name)["args"]) == {"model", "storage", "api_keys"}


def test_the_autoscaled_overlay_is_the_7b_file_with_two_fronts() -> None:
    overlay, file = application("autoscaled"), application("serve-minigpt5-7b.yaml")
    configs = {config["name"]: config for config in overlay["deployments"]}
    assert set(configs) == set(LABELLED)
    for config in file["deployments"]:
        assert configs[config["name"]] == config
    where = {"model", "storage", "api_keys", "front_replicas", "max_running"}
    assert {key: value for key, value in overlay["args"].items() if key not in where} == {
        key: value for key, value in file["args"].items() if key not in where
    }
    assert AppArgs.model_validate(overlay["args"]).max_running == file["args"]["max_running"]


@each_config
def test_an_address_that_others_reach_has_keys(name: str) -> None:
    assert CONFIGS[name]["http_options"]["host"] in LOOPBACK or application(name)["args"]["api_keys"]


@each_config
def test_every_engine_is_given_the_threads_that_it_uses(name: str, tmp_path: Path) -> None:
    args = AppArgs.model_validate(application(name)["args"])
    deployments = dry_build(args, tmp_path)
    for config in application(name).get("deployments", ()):
        deployments[config["name"]] = overridden(deployments[config["name"]], config)
    threads = {"VokenGenerator": args.generator_num_threads, "DiffusionDecoder": args.decoder_num_threads}
    for engine, num_threads in threads.items():
        deployment = deployments[engine]
        scaling = deployment._deployment_config.autoscaling_config
        assert scaling and 1 <= scaling.min_replicas <= scaling.max_replicas
        assert scaling.target_ongoing_requests <= deployment.max_ongoing_requests
        # A small machine reserves a part of what is used, so that the engines and the front fit two CPUs.
        assert num_threads / 2 <= deployment.ray_actor_options["num_cpus"] <= max(num_threads, 2)


def test_the_gpus_of_the_published_system_hold_what_its_comments_add_up() -> None:
    text = (FOLDER / "serve-minigpt5-7b.yaml").read_text()
    stated = re.findall(
        r"num_gpus: 1 # of (\d+) GB or more: weights ([\d.]+) GB .*?(?:KV store|a batch) ([\d.]+) GB", text
    )
    assert len(stated) == 2
    sizes = counts(build_model())
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
    deployments = application("serve-minigpt5-7b.yaml")["deployments"]
    host = {deployment["name"]: deployment["ray_actor_options"].get("memory") for deployment in deployments}
    assert host["VokenGenerator"] > 4 * (
        sizes["language model"] + sizes["vision encoder"] + sizes["Q-Former and projection"]
    )
    assert host["DiffusionDecoder"] > 4 * (sizes["UNet"] + sizes["VAE"] + sizes["mapper"])


def test_two_cpus_have_room_for_one_storybook_replica_of_each_engine(tmp_path: Path) -> None:
    deployments = dry_build(AppArgs.model_validate(application("serve-storybook.yaml")["args"]), tmp_path)
    asked = {name: deployment.ray_actor_options["num_cpus"] for name, deployment in deployments.items()}
    assert sum(asked.values()) <= 2 < sum(asked.values()) + min(asked["VokenGenerator"], asked["DiffusionDecoder"])


def test_the_application_keeps_the_link_to_a_mounted_secret(tmp_path: Path) -> None:
    """A path with its links resolved would name a folder that Kubernetes removes when the secret changes."""
    (tmp_path / "..data").mkdir()
    add_key(tmp_path / "..data" / "keys.json", "alice", per_minute=60, concurrent=8)
    (tmp_path / "keys.json").symlink_to("..data/keys.json")
    ingress = app(AppArgs(storage=str(tmp_path), api_keys=str(tmp_path / "keys.json")))._bound_deployment
    assert str(tmp_path / "keys.json") in ingress.init_args
