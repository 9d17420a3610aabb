"""Config files of the bases of docs/own-models.md, without weights: Qwen3-4B, SigLIP base, Stable Diffusion 2.1 base.

The numbers are those of the public `config.json` files.
"""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, Qwen3Config, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from minigpt5.model.sizes import SD21_TEXT, SD21_UNET, SD_VAE

QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": True,
}
SIGLIP_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}


def write_recipe(folder: Path) -> dict[str, Path]:
    """Write the config files; their places by the option of `minigpt5.new` that takes them."""
    places = {"language": folder / "qwen3", "diffusion": folder / "stable-diffusion", "vision": folder / "siglip"}
    Qwen3Config(**QWEN3_4B).save_pretrained(places["language"])
    SiglipVisionConfig(**SIGLIP_BASE).save_pretrained(places["vision"])
    SiglipImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(places["vision"])
    CLIPTextConfig(**SD21_TEXT).save_pretrained(places["diffusion"] / "text_encoder")
    for part, model_class, sizes in (("unet", UNet2DConditionModel, SD21_UNET), ("vae", AutoencoderKL, SD_VAE)):
        (places["diffusion"] / part).mkdir()
        text = json.dumps({"_class_name": model_class.__name__, **sizes})
        (places["diffusion"] / part / "config.json").write_text(text)
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(places["diffusion"] / "scheduler")
    return places
