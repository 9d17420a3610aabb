"""The builder: arguments -> Serve application. Every `.bind()` of the project is here."""

import dataclasses
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.api.errors import RETRY_AFTER_S
from deployments.api.routes import Ingress
from deployments.auth import load_keys
from deployments.engines.diffusion_decoder import DiffusionDecoder
from deployments.engines.placement import num_gpus_of_cluster, place_generator, share_gpus
from deployments.engines.voken_generator import VokenGenerator
from deployments.stories.ledger import LocalLedger
from minigpt5.codec import from_json
from minigpt5.config import default_model_folder
from minigpt5.engine.vllm.settings import VllmSettings
from minigpt5.limits import Limits, default_limits
from minigpt5.model.folder_config import load_config
from minigpt5.model.locate import locate, shared_name
from minigpt5.story.store import default_storage
from minigpt5.types import DecoderBackend, Precision, TextEngine, TextPrecision

SESSION_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
"""A generator has the beginning of the stories that it wrote: calls of one story go to the same one."""

MAX_REQUESTS = 800
"""Requests of a front at once, streams included. As many wait at each proxy, and Serve refuses more before our code.
Ray gives a replica 1000 calls at once: with 1000 requests there would be none for refusals and health checks."""

# Serve reads the annotation of `app` itself, so this file must not postpone annotations.


class AppArgs(BaseModel):
    """`serve run deployments:app key=value ...`, or `args:` in a Serve config.

    The defaults fit two CPUs with one replica of each engine: a second one there would only slow down the first, and
    waits until the cluster has more.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = Field(default_factory=lambda: str(default_model_folder()))
    """Model folder."""
    front_replicas: int = Field(default=1, ge=1)
    """HTTP fronts. They share their stories' leases, limits and events through one more deployment, the ledger: one
    front too, for an upgrade has the next one beside it."""
    storage: str = Field(default_factory=default_storage)
    """Folder or URI that keeps the stories."""
    api_keys: str = ""
    """File of API keys, which the front's node can read (see `deployments/auth.py`); none: no key is asked for."""
    filters: str | None = None
    """What is filtered: "text", "picture", both with a comma between, or "none"; as the model's config.json says where
    it is not given. See `minigpt5/story/safety.py`."""
    keep_days: float | None = Field(default=None, gt=0)
    """Stories that are older are removed; none: they stay."""
    keep_gib: float | None = Field(default=None, gt=0)
    """The oldest stories are removed while all take more; none: they stay."""
    max_wait_s: float = Field(default=300, gt=0)
    """A request that would be done later than this is answered with 503."""
    max_running: int = Field(default=128, ge=1)
    """Stories and picture requests that run at once, whatever they ask for; more are answered with 503."""
    generator_min_replicas: int = Field(default=1, ge=0)
    generator_max_replicas: int = Field(default=2, ge=1)
    generator_num_cpus: float = Field(default=0.7, gt=0)
    """What a replica reserves; `generator_num_threads` is what it may use."""
    generator_num_gpus: float | None = Field(default=None, ge=0)
    """GPUs of a replica, which computes on the CPU where it has none; none: one where Ray has two or more, half of a
    single one, which the decoder shares, else 0."""
    generator_num_threads: int = Field(default=1, ge=1)
    """torch threads of a replica. Writing mostly waits for memory: more help little."""
    generator_precision: TextPrecision | None = None
    """What the language model computes in; none: bfloat16 on a GPU, and on a CPU the faster of float32 and the base
    model's own 4-bit weights."""
    engine: TextEngine = "torch"
    """What runs the language model: our own loop on torch, or vLLM, which has an environment of its own."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """With engine=vllm: the fields of `minigpt5/engine/vllm/settings.py`."""
    generator_kv_cache_gib: float | None = Field(default=None, gt=0)
    """Size of a replica's KV store. None: `minigpt5/limits.py` says it and the next five, by the device."""
    generator_num_slots: int | None = Field(default=None, ge=1)
    """Requests that a replica has under way at once."""
    generator_max_batch: int | None = Field(default=None, ge=1)
    """Requests that take part in a step."""
    generator_short_read_tokens: int | None = Field(default=None, ge=1)
    """Tokens that are read at once; a longer prompt is read in parts."""
    generator_part_tokens: int | None = Field(default=None, ge=1)
    """Tokens of long prompts that a step reads while others write."""
    generator_long_read_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a step while nobody writes."""
    decoder_min_replicas: int = Field(default=1, ge=0)
    decoder_max_replicas: int = Field(default=2, ge=1)
    decoder_num_cpus: float = Field(default=1, gt=0)
    decoder_num_gpus: float | None = Field(default=None, ge=0)
    """As `generator_num_gpus`."""
    decoder_precision: Precision | None = None
    """Precision of the denoiser and the VAE; none: float32 on a CPU, and bfloat16 on a GPU. Below float32 a replica is
    smaller and faster, and a picture depends a little on its batch."""
    decoder_backend: DecoderBackend = "auto"
    """What computes the denoiser and the VAE; auto: OpenVINO on a CPU, and torch operation by operation elsewhere."""
    decoder_num_threads: int = Field(default=2, ge=1)
    decoder_max_batch: int = Field(default=8, ge=1)
    """Guided pictures of the model's own size that share a step."""
    log_level: str = "INFO"

    @field_validator("filters")
    @classmethod
    def are_known(cls, filters: str | None) -> str | None:
        if unknown := set(filters.split(",")) - {"text", "picture", "none"} if filters is not None else set():
            raise ValueError(f"filters is {filters!r}, and there is no {min(unknown)!r}: name text, picture or none")
        return filters

    @model_validator(mode="after")
    def has_room(self) -> "AppArgs":
        for engine in ("generator", "decoder"):
            low, high = getattr(self, f"{engine}_min_replicas"), getattr(self, f"{engine}_max_replicas")
            if low > high:
                raise ValueError(f"{engine}_min_replicas is {low} but {engine}_max_replicas is {high}")
        return self

    @model_validator(mode="after")
    def has_an_engine(self) -> "AppArgs":
        if self.engine == "torch" and self.vllm:
            raise ValueError(f"vllm is {self.vllm} but engine is torch: set engine=vllm, or leave it out")
        if self.engine == "vllm" and self.generator_precision:
            raise ValueError(
                f"generator_precision is {self.generator_precision!r} but vLLM computes in the precision of the "
                "exported folder: leave it out"
            )
        _ = self.vllm_settings  # raises ValueError
        return self

    @property
    def vllm_settings(self) -> VllmSettings | None:
        """None with engine=torch. Raises ValueError."""
        return from_json(VllmSettings, {"folder": "", **self.vllm}) if self.engine == "vllm" else None

    @property
    def limits(self) -> dict[str, float | None]:
        """The generator's limits, by their names in `minigpt5/limits.py`."""
        names = {field.name for field in dataclasses.fields(Limits)} - {"gpu_share"}
        return {name: getattr(self, f"generator_{name}") for name in names}


def app(args: AppArgs) -> Application:
    """The application. Raises ModelFolderError where `args.model` is no model folder, KeysError where `args.api_keys`
    has no keys."""
    return wire(args, VokenGenerator, DiffusionDecoder)


def wire(args: AppArgs, generator_class: type[VokenGenerator], decoder_class: type[DiffusionDecoder]) -> Application:
    """Wire the deployments of these engines."""
    config = load_config(locate(args.model))
    model = shared_name(args.model)
    filters = config.filters if args.filters is None else tuple(args.filters.split(","))
    storage = args.storage if "://" in args.storage else str(Path(args.storage).expanduser().resolve())
    # Links stay: Kubernetes renews a mounted secret by replacing one.
    api_keys = str(Path(args.api_keys).expanduser().absolute()) if args.api_keys else ""
    load_keys(api_keys or None)
    generator_gpus, decoder_gpus = args.generator_num_gpus, args.decoder_num_gpus
    if generator_gpus is None or decoder_gpus is None:
        share = share_gpus(num_gpus_of_cluster())
        generator_gpus = share if generator_gpus is None else generator_gpus
        decoder_gpus = share if decoder_gpus is None else decoder_gpus
    limits = default_limits("cuda" if generator_gpus else "cpu", **args.limits)  # of a replica, wherever this is
    # JSON: lines of text would be without the ids of story and request.
    logging_config = {"log_level": args.log_level, "encoding": "JSON"}
    # A replica that is replaced ends what it has begun; Serve's own limit of 20 s would tear pages.
    drain_s = args.max_wait_s
    generator = serve.deployment(
        generator_class,
        name="VokenGenerator",
        max_ongoing_requests=256,  # above max_running: cancelled stories may take a moment to end
        graceful_shutdown_timeout_s=drain_s,
        request_router_config=RequestRouterConfig(request_router_class=SESSION_ROUTER),
        autoscaling_config={
            "min_replicas": args.generator_min_replicas,
            "max_replicas": args.generator_max_replicas,
            "target_ongoing_requests": max(1, limits.max_batch // 2),
        },
        **place_generator(args.generator_num_cpus, generator_gpus, args.vllm_settings),
        max_constructor_retry_count=2,
        logging_config=logging_config,
    ).bind(model, args.generator_num_threads, args.generator_precision, args.limits, args.vllm_settings)
    decoder = serve.deployment(
        decoder_class,
        name="DiffusionDecoder",
        max_ongoing_requests=512,
        graceful_shutdown_timeout_s=drain_s,
        autoscaling_config={
            "min_replicas": args.decoder_min_replicas,
            "max_replicas": args.decoder_max_replicas,
            "target_ongoing_requests": 2 * args.decoder_max_batch,
        },
        ray_actor_options={"num_cpus": args.decoder_num_cpus, "num_gpus": decoder_gpus},
        max_constructor_retry_count=2,
        logging_config=logging_config,
    ).bind(
        model,
        args.decoder_num_threads,
        args.decoder_precision,
        args.decoder_backend,
        filters,
        args.decoder_max_batch,
    )
    ledger = serve.deployment(
        LocalLedger,
        name="Ledger",
        num_replicas=1,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0.1},
        logging_config={**logging_config, "enable_access_log": False},  # each front sends two heartbeats a second
    )
    return serve.deployment(
        Ingress,
        name="Ingress",
        num_replicas=args.front_replicas,
        max_ongoing_requests=MAX_REQUESTS,
        graceful_shutdown_timeout_s=drain_s,  # a front ends its streams
        max_queued_requests=MAX_REQUESTS,  # where every stream connects once more at the same moment
        backpressure_config={"status_code": 503, "retry_after_s": RETRY_AFTER_S},
        ray_actor_options={"num_cpus": 0.1},
        max_constructor_retry_count=2,
        logging_config={**logging_config, "enable_access_log": False},  # it has its own
    ).bind(
        generator,
        decoder,
        model,
        storage,
        args.max_wait_s,
        args.max_running,
        args.keep_days and args.keep_days * 86_400,
        args.keep_gib and args.keep_gib * 2**30,
        api_keys,
        filters,
        ledger.bind(),
    )
