"""The settings by which the shipped storybook model was trained: `--preset storybook`."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.presets import DistillPreset, OptimizerConfig, Preset, ReplayConfig, VisionPreset, VokenPreset


@dataclass(frozen=True, kw_only=True)
class VaePreset(Preset):
    """Stage "vae": pictures -> latents -> pictures."""

    crop_px: int = 64
    """Side of a crop."""


@dataclass(frozen=True, kw_only=True)
class UnetPreset(Preset):
    """Stage "unet": captions -> latents."""

    canonical_share: float = 0.7
    """Share of captions in the one phrasing that the vokens are aligned with."""
    placement_until: float = 0.0
    """Share of the run that teaches where things stand: the canonical phrasing alone, under noise from
    `first_timestep` on. The whole mixture hardly teaches it."""
    first_timestep: int = 0
    """Least noise until `placement_until`, without weights by timestep."""
    page_share: float = 0.0
    """Share of pages of stories, whose texts are the captions."""


@dataclass(frozen=True, kw_only=True)
class DecoderPreset(Preset):
    """Stage "decoder": fine-tunes the VAE decoder on denoised latents."""

    crop_px: int = 64
    """Side of a crop."""
    canonical_share: float = 0.7
    """See UnetPreset."""
    last_timestep: int = 0
    """Most noise of the latents that the UNet denoises."""


@dataclass(frozen=True, kw_only=True)
class SharpenPreset(Preset):
    """Stage "sharpen": pictures as the default request draws them -> the same ones, crisp."""

    canonical_share: float = 0.7
    """See UnetPreset."""
    decoder_learning_rate: float
    """Learning rate of the VAE decoder."""
    detail_weight: float
    """Weight of a sprite's missing correlation with what it should be."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)


@dataclass(frozen=True, kw_only=True)
class UpscalePreset(Preset):
    """Stage "upscale": latents -> pictures twice as large as the VAE's."""

    canonical_share: float = 0.7
    """See UnetPreset."""
    detail_weight: float
    """See SharpenPreset."""
    feature_weight: float
    """Weight of the distance of features (feature_loss.py) of true scenes."""
    scale: int = 2
    """How many times as large the pictures are."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)


@dataclass(frozen=True, kw_only=True)
class RetrievePreset(Preset):
    """Stage "retrieve": voken states -> the nearest picture of an index, and whether to draw instead (GILL, arXiv
    2305.17216, 3.2 and 3.3). The optimizer's rate is of all that is trained."""

    num_pictures: int
    """Captioned pictures that are learnt from."""
    num_indexed: int
    """Pictures of the index, others than those that are learnt from."""
    decides_from: float = 0.5
    """Share of the run after which the decision is learnt: from then on the index's embeddings are settled enough."""


# Departures from the published settings, which are made for 7 billion parameters and two days on four GPUs:
# learning rates (2e-5 for the vokens moves nothing in so few steps), text weight 0.3 in learn (0.01 starves it), the
# caption loss kept in learn, with contrasts, on the facts known so far (it teaches what "it" and "there" are without a
# UNet pass).
STORYBOOK: dict[str, Preset] = {
    "vae": VaePreset(
        stage="vae",
        steps=12_000,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=2e-3, ema_decay=0.998, weight_decay=0.0),
        bf16=True,
    ),
    "unet": UnetPreset(
        stage="unet",
        steps=10_000,
        batch_size=32,
        optimizer=OptimizerConfig(learning_rate=8e-4, ema_decay=0.998, warmup_steps=200),
        placement_until=0.2,
        first_timestep=500,
        bf16=True,
    ),
    "decoder": DecoderPreset(
        stage="decoder",
        steps=6_000,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=1e-3, ema_decay=0.998, weight_decay=0.0),
        last_timestep=600,
        bf16=True,
    ),
    "distill": DistillPreset(
        stage="distill",
        steps=2_000,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=3e-4, ema_decay=0.99),
        teacher_steps=5,
        replay=ReplayConfig(steps=3, min_size=256),
        bf16=True,
    ),
    "sharpen": SharpenPreset(
        stage="sharpen",
        steps=2_000,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=1.5e-4, ema_decay=0.995, weight_decay=0.0),
        decoder_learning_rate=1e-3,
        detail_weight=2.0,
        replay=ReplayConfig(steps=2, min_size=48),
        bf16=True,
    ),
    "upscale": UpscalePreset(
        stage="upscale",
        steps=3_000,
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=5e-4, ema_decay=0.998, weight_decay=0.0),
        detail_weight=2.0,
        feature_weight=2.0,
        replay=ReplayConfig(steps=2, min_size=32),
        bf16=True,
    ),
    "vision": VisionPreset(
        stage="vision",
        steps=6_000,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        words_until=0.6,
        bf16=True,
    ),
    "align": VokenPreset(
        stage="align",
        steps=8_000,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=5e-4, ema_decay=0.99),
        mapper_learning_rate=1e-3,
        voken_learning_rate=3e-3,
        text_weight=0.01,
        picture_weight=1.0,
        picture_from=0.7,
        caption_weight=1.0,
        replay=ReplayConfig(steps=6),
    ),
    "learn": VokenPreset(
        stage="learn",
        steps=1_000,
        batch_size=4,
        optimizer=OptimizerConfig(learning_rate=5e-4),
        mapper_learning_rate=1e-4,
        voken_learning_rate=5e-4,
        text_weight=0.3,
        caption_weight=1.0,
        contrast_weight=0.5,
        caption_share=0.3,
        phrasing_share=0.85,
        question_share=0.15,
        story_share=0.5,
        bf16=True,
    ),
    "refine": VokenPreset(
        stage="refine",
        steps=12_000,
        batch_size=32,
        optimizer=OptimizerConfig(ema_decay=0.995, warmup_steps=50),
        mapper_learning_rate=5e-4,
        caption_share=0.85,
        phrasing_share=0.8,
        story_share=0.13,
        voken_noise=0.3,
        caption_weight=1.0,
        contrast_weight=0.5,
        replay=ReplayConfig(steps=8, batch_size=48, min_size=16_000),
        bf16=True,
    ),
}
