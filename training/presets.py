"""The settings of a training run: one dataclass for each kind of stage, changed on the command line by key=value.

The presets of the shipped model are in training/storybook/presets.py.
"""

from __future__ import annotations

import dataclasses
import math
import pkgutil
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

DrawsBy = Literal["vokens", "description", "mark"]
"""What the language model writes where a picture is drawn: vokens; the picture's caption between marks (Divter, arXiv
2110.08515); a mark alone."""
NUM_LIVE_PARAMETERS = 1_000_000_000


def check_ranges(config: object, names: str, *, least: float = 0, most: float = math.inf, group: str = "") -> None:
    """Raise ValueError where one of the fields `names`, which spaces part, is out of its range, or no number."""
    for name in names.split():
        value = getattr(config, name)
        if not least <= value <= most:
            bounds = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
            raise ValueError(f"{group}{name} is {value} but must be {bounds}: set {group}{name}=")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule, and how workers share it."""

    learning_rate: float = 0.0
    """Learning rate of what the stage trains first of all; stages name other rates themselves. 0 freezes the part."""
    warmup_steps: int = 100
    """Steps in which the rate grows to its full height; 0: none."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """After the warm-up: half a cosine down to a hundredth, or a line down to 0."""
    weight_decay: float = 0.01
    beta2: float = 0.99
    max_grad_norm: float = 1.0
    """Longest gradient of a step; 0: no clipping."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients make one step."""
    ema_decay: float = 0.0
    """Decay of the running average of the weights, which is saved; 0: none."""
    zero_stage: int | None = None
    """ZeRO stage of DeepSpeed, 0 to 3; none: torch's own optimizer."""
    zero_offload: bool = False
    """DeepSpeed keeps the optimizer's state in the host's memory."""
    zero_live_parameters: int = NUM_LIVE_PARAMETERS
    """Elements of the weights that a worker holds whole at once under ZeRO 3, which gathers them layer by layer."""
    times_communication: bool = False
    """Wait for and time each of DeepSpeed's messages. Without, their time is part of the phase that sends them."""

    def __post_init__(self) -> None:
        if self.zero_stage is not None and not 0 <= self.zero_stage <= 3:
            raise ValueError(f"zero_stage is {self.zero_stage} but must be from 0 to 3, or none")
        check_ranges(self, "gradient_accumulation_steps", least=1)
        check_ranges(self, "learning_rate warmup_steps weight_decay max_grad_norm zero_live_parameters")
        check_ranges(self, "beta2 ema_decay", most=1)
        if self.beta2 == 1:  # AdamW divides by what is missing to 1
            raise ValueError("beta2 is 1 but must be less: set beta2=")
        stage = "none" if self.zero_stage is None else self.zero_stage
        if self.zero_offload and not self.zero_stage:
            raise ValueError(f"zero_offload is true but zero_stage is {stage}: set zero_stage to 1, 2 or 3")
        if self.zero_live_parameters != NUM_LIVE_PARAMETERS and self.zero_stage != 3:
            raise ValueError(
                f"zero_live_parameters is {self.zero_live_parameters} but zero_stage is {stage}: set zero_stage=3, or "
                "leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Extra steps on samples of earlier steps, which cost more to make than to learn from. See data/replay.py."""

    steps: int = 0
    """Steps on replayed samples after each step on new ones."""
    batch_size: int = 32
    """Batch size of the mapper's replayed steps; the storybook's own stages replay batches of their usual size."""
    min_size: int = 1
    """Samples in the buffer before any is replayed: fewer would be learnt by heart."""
    fill: int = 0
    """If not 0: the first so many captions of the run are read once, before its first step, and every step replays
    them. For stage "align" with voken rows that are not trained: then their states do not change."""

    def __post_init__(self) -> None:
        check_ranges(self, "steps fill", group="replay.")
        check_ranges(self, "batch_size min_size", least=1, group="replay.")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings that every stage has."""

    stage: str
    """A key of STAGES."""
    steps: int
    """Optimizer steps of the whole run; 0: none, but for `epochs`."""
    epochs: float = 0.0
    """If not 0: how often every stored example is used. `steps` is 0 then."""
    minutes: float = 0.0
    """If not 0: the run ends after this time even if `steps` are not done; the schedule follows the nearer end."""
    batch_size: int
    """Examples of a batch, of all workers together."""
    per_gpu_batch_size: int = 0
    """If not 0: examples of a batch for each worker; replaces `batch_size`."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 1
    num_threads: int = 2
    """torch threads of a worker."""
    bf16: bool = False
    """Run the objective under bfloat16 autocast, but on a CPU without it. What is trained, its optimizer and the
    losses stay float32."""
    frozen_bf16: bool | None = None
    """Keep the matrices of frozen base models in bfloat16, mapped from their files where they are stored so: then all
    workers of a machine share them. None: where `bf16` is on. True needs `bf16`, and computes so on any CPU."""
    validation_batches: int = 0
    """Batches of examples that are never trained on, measured before the first step and at every checkpoint."""
    checkpoint_every_s: float = 180.0
    sheet_every_s: float = 300.0
    draws_samples: bool = True
    """Draw sheets of pictures and write sample stories."""
    log_every: int = 50
    """Steps."""
    profiles: bool = False
    """Wait for the GPU after each phase of a step, so that its seconds are its own. Without, a step waits for its
    losses and for the norm of its gradient."""
    log_examples: bool = False
    """Keep the ids of every step's examples in examples-<worker>.jsonl, to say afterwards what was used."""

    def __post_init__(self) -> None:
        if self.frozen_bf16 and not self.bf16:
            raise ValueError("frozen_bf16 is true but bf16 is false: set bf16=true")
        check_ranges(self, "batch_size num_threads log_every", least=1)
        check_ranges(self, "steps epochs minutes per_gpu_batch_size seed validation_batches")
        check_ranges(self, "checkpoint_every_s sheet_every_s")
        if self.steps and self.epochs:
            raise ValueError(f"steps is {self.steps} and epochs is {self.epochs:g}: leave one out, or set it to 0")
        if self.minutes and not self.steps and not self.epochs:
            raise ValueError(f"minutes is {self.minutes:g} but steps is 0, which ends the run at once: set steps=")

    @property
    def halves_frozen(self) -> bool:
        """Whether frozen base models are kept in bfloat16."""
        return self.bf16 if self.frozen_bf16 is None else self.frozen_bf16


@dataclass(frozen=True, kw_only=True)
class VisionPreset(Preset):
    """Stage "vision": picture -> description. Trains the Q-Former, with the optimizer's rate."""

    text_weight: float = 1.0
    words_until: float = 0.0
    """Share of the run that learns words alone, without a pass of the language model."""
    checkpoint_activations: bool = False
    """See VokenPreset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "text_weight")
        check_ranges(self, "words_until", most=1)


@dataclass(frozen=True, kw_only=True)
class VokenPreset(Preset):
    """Stages "align", "learn" and "refine". The optimizer's rate is the adapter's."""

    voken_learning_rate: float = 0.0
    """Learning rate of the new tokens' embeddings and head weights."""
    mapper_learning_rate: float = 0.0
    text_weight: float = 0.0
    picture_weight: float = 0.0
    picture_from: float = 0.0
    """Share of the run after which the picture loss counts."""
    caption_weight: float = 0.0
    contrast_weight: float = 0.0
    """Weight of telling a caption from others that differ in one fact."""
    first_timestep: int = 0
    """Least noise of the picture loss; above 0 the loss has no weights by timestep."""
    voken_noise: float = 0.0
    """Noise added to voken states, in units of their spread."""
    guidance_dropout: float = 0.1
    """Share of pictures whose vokens are zeroed, so that the null condition is learnt."""
    samples_latents: bool = False
    """Train on samples of the VAE's posterior, as published; else on its mode."""
    standardises: bool = True
    """Divide each feature of the caption loss by its spread; else plain mean squared error, as published."""
    whitens: bool = True
    """Train the mapper on whitened voken states; else on the states themselves, as published."""
    trains_queries: bool = True
    """Train the mapper's `fc` and queries too; the published second stage freezes them."""
    checkpoint_activations: bool = False
    """Recompute the language model's activations in the backward pass instead of keeping them (arXiv 1604.06174)."""
    caption_share: float = 0.25
    """Share of bare captions among the picture world's examples of "learn" and "refine", so that captions are not
    forgotten."""
    phrasing_share: float = 0.0
    """Share of the picture world's captions that are said as people ask, by the grammar of
    minigpt5/storybook/phrasings.py; the others are the world's own."""
    story_share: float = 0.5
    """Share of whole stories among the examples of "learn" and "refine"; the rest are single pages."""
    dialogue_share: float = 0.0
    """Share of turns of dialogues among the picture world's examples of "learn" and "refine"."""
    question_share: float = 0.0
    """Share of questions in a chat among the picture world's examples of "learn": what a picture shows, asked in many
    ways, and requests for a picture."""
    num_examples: int = 0
    """If not 0: the picture world has so many examples, which come again and again."""
    draws_by: DrawsBy = "vokens"
    tunes: Literal["adapter", "prefix", "body"] = "adapter"
    """What the optimizer's rate trains of the language model in "learn": an adapter; keys and values before every
    sequence; or all of it, which the model folder then holds as a base model of its own."""
    prefix_tokens: int = 5
    """Tokens of the prefix, as the published code has them."""
    keeps_states: bool = False
    """Keep the frozen language model's voken states of captions under the runs, for others that begin alike."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "prefix_tokens", least=1)
        check_ranges(self, "voken_learning_rate mapper_learning_rate voken_noise first_timestep num_examples")
        check_ranges(self, "text_weight picture_weight caption_weight contrast_weight")
        check_ranges(self, "picture_from guidance_dropout caption_share phrasing_share story_share", most=1)
        check_ranges(self, "dialogue_share question_share", most=1)


@dataclass(frozen=True, kw_only=True)
class DistillPreset(Preset):
    """Stage "distill": the guided denoiser -> one that needs neither guidance nor many steps."""

    teacher_steps: int
    """Guided steps of the denoiser that one step of the distilled one replaces."""
    checkpoint_activations: bool = False
    """Recompute the distilled denoiser's activations in the backward pass instead of keeping them."""
    canonical_share: float = 0.7
    """Share of captions of the picture world in the one phrasing that the vokens are aligned with."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "teacher_steps", least=1)
        check_ranges(self, "canonical_share", most=1)


RIVALS = (
    *("minigpt5", "gill", "divter", "two-stage", "stable-diffusion", "text-only", "minigpt4"),
    *("no-caption-loss", "no-diffusion-loss", "no-guidance-dropout", "no-stage-1", "no-transformer"),
    *("vokens-1", "vokens-4", "vokens-16", "frozen", "prefix", "full", "data-10", "data-30"),
)
"""Presets of one reduced budget: our model, others' ways and ablations. See training/storybook/rivals.py."""
PRESETS = {
    "published": "training.presets:PUBLISHED",
    "storybook": "training.storybook.presets:STORYBOOK",
    **{name: f"training.storybook.rivals:RIVALS/{name}" for name in RIVALS},
}
"""Where each preset's stages are; `load_presets` imports them."""

STAGES = {
    "vae": "training.storybook.vae:VaeStage",
    "unet": "training.storybook.unet:UnetStage",
    "distill": "training.stages.distill:DistillStage",
    "decoder": "training.storybook.decoder:DecoderStage",
    "sharpen": "training.storybook.sharpen:SharpenStage",
    "upscale": "training.storybook.upscale:UpscaleStage",
    "vision": "training.stages.vision:VisionStage",
    "align": "training.stages.voken:VokenStage",
    "learn": "training.stages.voken:VokenStage",
    "refine": "training.stages.voken:VokenStage",
    "retrieve": "training.storybook.retrieve:RetrieveStage",
}
"""Where each stage's class is; `training.stage.build_stage` imports it."""


def load_presets(name: str) -> Mapping[str, Preset]:
    """The stages of a preset: a key of PRESETS."""
    place, _, key = PRESETS[name].partition("/")
    found = pkgutil.resolve_name(place)
    return found[key].stages if key else found


# As published (arXiv 2310.02239 and its code): two epochs of CC3M, then of VIST or MMDialog, on four GPUs of 48 GB for
# two days each; no clipping, no checkpointing of activations; frozen parts in bfloat16.
_PUBLISHED_OPTIMIZER = OptimizerConfig(
    warmup_steps=1_000, schedule="linear", beta2=0.999, max_grad_norm=0.0, gradient_accumulation_steps=6
)
_PUBLISHED = VokenPreset(
    stage="align",
    steps=0,
    epochs=2,
    batch_size=8,
    optimizer=_PUBLISHED_OPTIMIZER,
    mapper_learning_rate=2e-4,
    voken_learning_rate=2e-5,
    seed=42,
    bf16=True,
    text_weight=0.01,
    picture_weight=1.0,
    caption_weight=0.1,
    samples_latents=True,
    standardises=False,
    whitens=False,
    validation_batches=8,
    checkpoint_every_s=900.0,
    sheet_every_s=3_600.0,
)
PUBLISHED: dict[str, Preset] = {
    # A Q-Former of one's own, as BLIP-2 trains its one (arXiv 2301.12597, 4.1); the published system has none to train.
    "vision": VisionPreset(
        stage="vision",
        steps=0,
        epochs=2,
        batch_size=8,
        optimizer=dataclasses.replace(_PUBLISHED_OPTIMIZER, learning_rate=1e-4, weight_decay=0.05, beta2=0.98),
        seed=42,
        bf16=True,
        validation_batches=8,
        checkpoint_every_s=900.0,
        sheet_every_s=3_600.0,
    ),
    "align": _PUBLISHED,
    "learn": dataclasses.replace(
        _PUBLISHED,
        stage="learn",
        optimizer=dataclasses.replace(_PUBLISHED_OPTIMIZER, learning_rate=2e-5),
        mapper_learning_rate=2e-5,
        trains_queries=False,
        caption_weight=0.0,
        story_share=0.0,
        caption_share=0.0,
    ),
    # The published system draws with 50 steps and distills nothing. No full-size model was distilled with these here.
    "distill": DistillPreset(
        stage="distill",
        steps=10_000,
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=500, ema_decay=0.99),
        seed=42,
        bf16=True,
        teacher_steps=10,
        replay=ReplayConfig(steps=3, min_size=64),
        validation_batches=8,
        checkpoint_every_s=900.0,
        sheet_every_s=3_600.0,
    ),
}

P = TypeVar("P", bound=Preset)


def for_workers(preset: P, num_workers: int) -> P:
    """The preset with the `batch_size` that follows from `per_gpu_batch_size`, where that is set."""
    if not preset.per_gpu_batch_size:
        return preset
    batch_size = preset.per_gpu_batch_size * max(1, num_workers)
    return dataclasses.replace(preset, batch_size=batch_size, per_gpu_batch_size=0)


def override(preset: P, settings: list[str]) -> P:
    """Apply `key=value` settings: fields of the preset, fields of its optimizer by their own name or as
    `optimizer.name`, fields of other groups as `group.name`, such as `replay.steps=3`.

    Raises ValueError: for an unknown key, for a value of the wrong type or out of its range, and for settings that
    exclude each other.
    """
    places = _places(preset)
    changes: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in places:
            names = sorted(name for name in places if not name.startswith("optimizer."))
            raise ValueError(f"unknown setting {setting!r}: use key=value with one of {', '.join(names)}")
        group, name, kind = places[key]
        changes.setdefault(group, {})[name] = _parse(key, text, kind)
    own = changes.pop("", {})
    if "steps" in own:
        own.setdefault("epochs", 0.0)  # a number of steps says how long the run is
    elif own.get("epochs"):
        own["steps"] = 0
    if {"batch_size", "per_gpu_batch_size"} <= set(own):
        raise ValueError("batch_size and per_gpu_batch_size are both set: leave one out")
    groups = {group: dataclasses.replace(vars(preset)[group], **values) for group, values in changes.items()}
    return dataclasses.replace(preset, **own, **groups)


def _places(preset: Preset) -> dict[str, tuple[str, str, Any]]:
    """Key -> group ("" for the preset's own fields), name and type of a field."""
    places: dict[str, tuple[str, str, Any]] = {}
    for name, kind in typing.get_type_hints(type(preset)).items():
        if dataclasses.is_dataclass(kind):
            for inner, inner_kind in typing.get_type_hints(kind).items():
                places[f"{name}.{inner}"] = (name, inner, inner_kind)
                if name == "optimizer":
                    places[inner] = (name, inner, inner_kind)
        elif name != "stage":
            places[name] = ("", name, kind)
    return places


def _parse(key: str, text: str, kind: Any) -> Any:
    """A value of the type that a field has."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if text not in options:
            raise ValueError(f"{key} is {text!r} but must be {' or '.join(options)}")
        return text
    if typing.get_origin(kind) is types.UnionType:
        if text == "none":
            return None
        kind = options[0]
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{key} is {text!r} but must be true or false")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key} is {text!r} but must be a number of type {kind.__name__}") from None
