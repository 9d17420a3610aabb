"""A run is a Preset: the storybook's recipes, changed on the command line by key=value."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of one training stage."""

    stage: str
    steps: int
    """Optimizer steps of the whole run; 0: none, but for `epochs`."""
    epochs: float = 0.0
    """If not 0: times that every stored row is used, in the place of `steps`."""
    minutes: float = 0.0
    """If not 0: the run ends after this time even if `steps` are not done; the schedule follows the nearer end."""
    batch_size: int
    gradient_accumulation_steps: int = 1
    """Batches whose gradients make a step."""
    learning_rate: float
    warmup_steps: int = 100
    decays_linearly: int = 0
    """1: the rate falls in a line to 0; 0: in half a cosine to a hundredth."""
    weight_decay: float = 0.01
    beta2: float = 0.99
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Of the gradients of a step; 0: as long as they are."""
    ema_decay: float = 0.0
    """Decay of the running average that is saved; 0: none."""
    seed: int = 1
    num_threads: int = 2
    bf16: int = 0
    """1: the objective runs under bfloat16 autocast, but on a CPU without it; what is trained, its optimizer and
    the losses stay float32, frozen matrices that are never saved are halved."""
    zero_stage: int = -1
    """ZeRO stage of DeepSpeed, 0 to 3; -1: torch's own optimizer."""
    zero_offload: int = 0
    """1: DeepSpeed keeps the optimizer's state in the host's memory."""
    crop_px: int = 64
    """Side of the crops of "vae" and "decoder"."""
    checkpoint_activations: int = 0
    """1: the language model's activations are computed again on the way back instead of kept (arXiv 1604.06174)."""
    validation_batches: int = 0
    """Batches of rows that are never trained on, measured at every checkpoint."""
    samples_latents: int = 0
    """1: pictures are drawn from the VAE's posterior, as published; 0: its mode."""
    standardises: int = 1
    """1: each feature of the caption loss counts by its spread; 0: plain mean squared error, as published."""
    whitens: int = 1
    """1: the mapper learns on whitened voken states; 0: as they are, as published."""
    trains_queries: int = 1
    """0: the mapper's `fc` and queries are frozen, as in the published second stage."""
    canonical_share: float = 0.7
    """Of the diffusion model's captions that are in the one phrasing which the vokens are aligned with."""
    placement_until: float = 0.0
    """Share of the run in which "unet" learns where things stand, which the whole mixture hardly teaches: that phrasing
    alone, under noise from `first_timestep` on."""
    teacher_steps: int = 0
    """Guided steps of the UNet that one step of the distilled one takes the place of."""
    last_timestep: int = 0
    """Most noise that the UNet cleans the latents of which "decoder" learns from."""
    text_weight: float = 0.0
    picture_weight: float = 0.0
    picture_from: float = 0.0
    """Share of the run after which the picture loss counts."""
    caption_weight: float = 0.0
    contrast_weight: float = 0.0
    """Of telling the caption from others that differ in one fact."""
    voken_noise: float = 0.0
    """Added to voken states, in units of their spread."""
    first_timestep: int = 0
    """Least noise of the picture loss, and of that of "unet" until `placement_until`; above 0 it is unweighted."""
    detail_weight: float = 0.0
    """Of what the sprites of a picture lack in correlation with what they should be."""
    replay_steps: int = 0
    """Steps on what is remembered after each step on fresh rows: of the mapper alone on the language model's states, or
    in "distill" on the teacher's steps, in "sharpen" on pictures that were drawn."""
    replay_batch_size: int = 32
    replay_from: int = 1
    """Pictures that are remembered before any is replayed: fewer would be learnt by heart."""
    words_until: float = 0.0
    """Share of the run in which "vision" learns words alone, without a pass of the language model."""
    caption_share: float = 0.25
    story_share: float = 0.5
    """Of the rows of "learn" and "refine": bare captions, lest they are forgotten, and stories; the rest are pages."""
    voken_learning_rate: float = 0.0
    mapper_learning_rate: float = 0.0
    decoder_learning_rate: float = 0.0
    """Of the VAE's decoder in "sharpen"."""
    checkpoint_every_s: float = 180.0
    sheet_every_s: float = 300.0
    times_communication: int = 0
    """1: each of DeepSpeed's messages is waited for and timed; without, its time is in that of what it is a part of."""
    log_every: int = 50
    log_rows: int = 0
    """1: the ids of the rows of every step are kept in rows-<worker>.jsonl, to say afterwards what was used."""


# As published (arXiv 2310.02239 and its code): two epochs of CC3M, then of VIST or MMDialog, on four GPUs of 48 GB for
# two days each; no clipping, no checkpointing of activations; frozen parts in bfloat16.
_PUBLISHED = Preset(
    stage="align",
    steps=0,
    epochs=2,
    batch_size=8,
    gradient_accumulation_steps=6,
    learning_rate=0.0,
    mapper_learning_rate=2e-4,
    voken_learning_rate=2e-5,
    warmup_steps=1_000,
    decays_linearly=1,
    beta2=0.999,
    max_grad_norm=0.0,
    seed=42,
    bf16=1,
    text_weight=0.01,
    picture_weight=1.0,
    caption_weight=0.1,
    samples_latents=1,
    standardises=0,
    whitens=0,
    validation_batches=8,
)
PUBLISHED = {
    "align": _PUBLISHED,
    "learn": dataclasses.replace(
        _PUBLISHED,
        stage="learn",
        learning_rate=2e-5,
        mapper_learning_rate=2e-5,
        trains_queries=0,
        caption_weight=0.0,
        story_share=0.0,
        caption_share=0.0,
    ),
}

# Departures from the published settings, which are made for 7 billion parameters and two days on four GPUs:
# learning rates (2e-5 for the rows moves nothing in so few steps), text weight 0.3 in learn (0.01 starves it), the
# caption loss kept in learn, with contrasts, on the facts known so far (it teaches what "it" and "there" are without a
# UNet pass).
STORYBOOK = {
    "vae": Preset(
        stage="vae", steps=12_000, batch_size=16, learning_rate=2e-3, ema_decay=0.998, weight_decay=0.0, bf16=1
    ),
    "unet": Preset(
        stage="unet",
        steps=10_000,
        batch_size=32,
        learning_rate=8e-4,
        ema_decay=0.998,
        warmup_steps=200,
        placement_until=0.2,
        first_timestep=500,
        bf16=1,
    ),
    "decoder": Preset(
        stage="decoder",
        steps=6_000,
        batch_size=16,
        learning_rate=1e-3,
        ema_decay=0.998,
        weight_decay=0.0,
        last_timestep=600,
        bf16=1,
    ),
    "distill": Preset(
        stage="distill",
        steps=2_000,
        batch_size=16,
        learning_rate=3e-4,
        ema_decay=0.99,
        teacher_steps=5,
        replay_steps=3,
        replay_from=256,
        bf16=1,
    ),
    "sharpen": Preset(
        stage="sharpen",
        steps=2_000,
        batch_size=16,
        learning_rate=1.5e-4,
        decoder_learning_rate=1e-3,
        weight_decay=0.0,
        ema_decay=0.995,
        detail_weight=2.0,
        replay_steps=2,
        replay_from=48,
        bf16=1,
    ),
    "vision": Preset(
        stage="vision",
        steps=6_000,
        batch_size=16,
        learning_rate=1e-3,
        text_weight=1.0,
        words_until=0.6,
        bf16=1,
    ),
    "align": Preset(
        stage="align",
        steps=8_000,
        batch_size=16,
        learning_rate=5e-4,
        mapper_learning_rate=1e-3,
        voken_learning_rate=3e-3,
        text_weight=0.01,
        picture_weight=1.0,
        picture_from=0.7,
        caption_weight=1.0,
        replay_steps=6,
        ema_decay=0.99,
    ),
    "learn": Preset(
        stage="learn",
        steps=1_000,
        batch_size=4,
        learning_rate=5e-4,
        mapper_learning_rate=1e-4,
        voken_learning_rate=5e-4,
        text_weight=0.3,
        caption_weight=1.0,
        contrast_weight=0.5,
        caption_share=0.15,
        story_share=0.8,
        bf16=1,
    ),
    "refine": Preset(
        stage="refine",
        steps=12_000,
        batch_size=32,
        learning_rate=0.0,
        mapper_learning_rate=5e-4,
        caption_share=0.85,
        story_share=0.13,
        voken_noise=0.3,
        caption_weight=1.0,
        contrast_weight=0.5,
        replay_steps=8,
        replay_batch_size=48,
        replay_from=16_000,
        ema_decay=0.995,
        warmup_steps=50,
        bf16=1,
    ),
}


def override(preset: Preset, settings: list[str]) -> Preset:
    """Apply `key=value` settings. An unknown key or a value of the wrong type raises ValueError."""
    fields = {field.name: field for field in dataclasses.fields(Preset) if field.name != "stage"}
    changes: dict[str, object] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in fields:
            raise ValueError(f"unknown setting {setting!r}: use key=value with one of {', '.join(sorted(fields))}")
        kind = {"int": int, "float": float}[str(fields[key].type)]
        try:
            changes[key] = kind(value)
        except ValueError:
            raise ValueError(f"{key} is {value!r} but must be a number of type {kind.__name__}") from None
    changed = dataclasses.replace(preset, **changes)  # type: ignore[arg-type]
    if not -1 <= changed.zero_stage <= 3:
        raise ValueError(f"zero_stage is {changed.zero_stage} but must be from -1 to 3")
    return changed
