"""The real classes at tiny size, with random weights: what tests run on where no trained weights are needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import LlamaConfig, LlamaModel

from minigpt5.config import ModelConfig, VisionConfig, storybook
from minigpt5.model.base_models import resolve
from minigpt5.model.decoders.load import find_family
from minigpt5.model.decoders.noise import VariancePreserving
from minigpt5.model.decoders.stable_diffusion import StableDiffusion
from minigpt5.model.language import LanguageModel, load_tokenizer
from minigpt5.model.mapper import Mapper
from minigpt5.model.vision import Vision
from minigpt5.model.vokens import VokenEmbeddings
from minigpt5.model.weights import load_module
from training.storybook.new_decoder import new_storybook_noise_schedule

HIDDEN = 48


def tiny_config() -> ModelConfig:
    config = storybook()
    vision = dataclasses.replace(config.vision, hidden=16, num_layers=1, num_heads=2, num_queries=4)
    assert isinstance(vision, VisionConfig)
    return dataclasses.replace(
        config,
        name="tiny",
        hidden=HIDDEN,
        vision=vision,
        condition_length=6,
        condition_width=16,
        mapper_layers=1,
        mapper_heads=2,
        image_px=32,
        max_pixels=64 * 48,
        size_multiple=8,
        context_tokens=600,
        fingerprint="f" * 64,
    )


def tiny_config_of(folder: Path, **changes: Any) -> ModelConfig:
    """The tiny model's config with the condition of a folder's diffusion model."""
    sizes = find_family(folder).read_sizes(folder)
    return dataclasses.replace(
        tiny_config(),
        condition_length=sizes.condition_length,
        condition_width=sizes.condition_width,
        condition_pooled=sizes.condition_pooled,
        **changes,
    )


def tiny_language(config: ModelConfig) -> LanguageModel:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    body = LlamaModel(shape).eval().requires_grad_(False)
    head_TH = torch.randn(config.vocabulary, HIDDEN) * 0.1
    head = nn.Linear(HIDDEN, config.vocabulary, bias=False, device="meta")
    head.weight = nn.Parameter(head_TH, requires_grad=False)
    language = LanguageModel(body, head, VokenEmbeddings(config.vocabulary, config.num_vokens, HIDDEN))
    language.initialise_vokens(seed=0)
    return language


def tiny_tokenizer(config: ModelConfig):  # type: ignore[no-untyped-def]
    return load_tokenizer(resolve(config.language_model), config)


def tiny_vision(config: ModelConfig) -> Vision:
    torch.manual_seed(1)
    vision = Vision(config)
    load_module(vision.encoder.network, resolve(config.vision.encoder) / "model.safetensors")
    return vision


def tiny_mapper(config: ModelConfig) -> Mapper:
    torch.manual_seed(2)
    return Mapper(config)


def tiny_diffusion(config: ModelConfig, *, is_distilled: bool = False) -> StableDiffusion:
    """`is_distilled`: with a second UNet."""
    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )
    unet, distilled = (
        UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 16),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=config.condition_width,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        for _ in range(2)
    )
    noise = VariancePreserving(new_storybook_noise_schedule())
    return StableDiffusion(vae, unet, noise, distilled if is_distilled else None).eval()


def save_tiny(folder: Path, *, language: LanguageModel | None = None) -> ModelConfig:
    """A whole model folder of tiny parts."""
    from minigpt5.model import folder as model_folder

    config = tiny_config()
    model_folder.save_diffusion(tiny_diffusion(config), folder / "decoder")
    return model_folder.save(
        folder,
        config,
        language=language or tiny_language(config),
        mapper=tiny_mapper(config),
        vision=tiny_vision(config),
    )


class SomeStates:
    """Stands in for the text encoder at the tiny model's width: a caption's own noise."""

    def __init__(self) -> None:
        self.config = tiny_config()

    def __call__(self, captions: list[str]) -> torch.Tensor:
        shape = (self.config.condition_length, self.config.condition_width)
        seeds = [sum(caption.encode()) for caption in captions]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def trained_parts(diffusion: StableDiffusion) -> set[str]:
    """First and second part of the names of what has a gradient."""
    names = (name.split(".")[:2] for name, p in diffusion.named_parameters() if p.grad is not None and p.grad.any())
    return {".".join(parts) for parts in names}
