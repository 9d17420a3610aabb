"""Tiny random base models of the real classes, which stand for your own: Qwen3, SigLIP, Stable Diffusion 2.1.

Their sizes are the only thing that is not real. As in the large Qwen3, the vocabulary is padded beyond the tokenizer
and there is no BOS token.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SEED = 0
NUM_PADDING_ROWS = 53
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
CLIP_TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
CHAT_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 259 tokens, with the chat template of Qwen3-Instruct, without its tools."""
    tokens = {token: number for number, token in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    own.chat_template = CHAT_TEMPLATE
    own.save_pretrained(folder)
    return own


def make_qwen3(folder: Path) -> None:
    """A Qwen3 with a byte-level tokenizer."""
    own = make_tokenizer(folder)
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=len(own) + NUM_PADDING_ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=own.eos_token_id,
        bos_token_id=None,
        pad_token_id=own.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def make_siglip(folder: Path) -> None:
    """A SigLIP tower that reads pictures of 32 pixels as 16 patches."""
    torch.manual_seed(SEED)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def make_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with bytes alone and no merges."""
    vocabulary = {token: number for number, token in enumerate(CLIP_TOKENS)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token="!")


def clip_text_config(*, hidden_size: int = 32, **sizes: int) -> CLIPTextConfig:
    """Sizes of a text encoder for this tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(CLIP_TOKENS),
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=len(CLIP_TOKENS) - 2,
        eos_token_id=len(CLIP_TOKENS) - 1,
        **sizes,
    )


def make_vae(*, latent_channels: int = 4, **options: object) -> AutoencoderKL:
    """32 pixels <-> 8 x 8 latents."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        **options,
    )


def make_stable_diffusion(folder: Path, *, prediction_type: str = "epsilon") -> None:
    """A Stable Diffusion 2.1 that draws 32 pixels from 8 x 8 latents."""
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=make_vae(),
        unet=unet,
        scheduler=scheduler,
        text_encoder=CLIPTextModel(clip_text_config()),
        tokenizer=make_clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_bases(folder: Path) -> dict[str, Path]:
    """Write all three under `folder`; their places by the option of `minigpt5.new` that takes them."""
    places = {"language": folder / "qwen3", "vision": folder / "siglip", "diffusion": folder / "stable-diffusion"}
    makers = {"language": make_qwen3, "vision": make_siglip, "diffusion": make_stable_diffusion}
    for name, place in places.items():
        place.mkdir(parents=True)
        makers[name](place)
    return places
