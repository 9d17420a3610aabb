"""Sizes of published models, from their configs alone; no weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.own_model.tiny_bases import make_vae
from minigpt5.errors import ModelFolderError
from minigpt5.model.decoders.diffusion import DecoderSizes, load_part
from minigpt5.model.decoders.load import find_family
from minigpt5.types import DrawSettings

VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 16}
CLIP = {"max_position_embeddings": 77}
SD3_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM = {
    **SD3_MEDIUM,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
}
SD35_LARGE = {
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
FLUX_DEV = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
}
FLUX_SCHNELL = {**FLUX_DEV, "guidance_embeds": False}
SANA_1600M = {
    "_class_name": "SanaTransformer2DModel",
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "sample_size": 32,
    "patch_size": 1,
}
ERNIE_IMAGE = {
    "_class_name": "ErnieImageTransformer2DModel",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_layers": 36,
    "ffn_hidden_size": 12288,
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "text_in_dim": 3072,
    "rope_theta": 256,
    "rope_axes_dim": [32, 48, 48],
}
SD3, FLUX, SANA, ERNIE = "StableDiffusion3Pipeline", "FluxPipeline", "SanaPipeline", "ErnieImagePipeline"
VAES = {
    SANA: {
        "_class_name": "AutoencoderDC",
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "latent_channels": 32,
    },
    ERNIE: {**VAE, "_class_name": "AutoencoderKLFlux2", "latent_channels": 32, "sample_size": 1024},
}
"""Of the families whose autoencoder is not `VAE`."""


def draw(steps: int, guidance_scale: float) -> DrawSettings:
    return DrawSettings(steps=steps, guidance_scale=guidance_scale, scheduler="euler")


def sizes(condition_length: int, condition_pooled: int, settings: DrawSettings) -> DecoderSizes:
    return DecoderSizes(
        condition_length=condition_length,
        condition_width=4096,
        condition_pooled=condition_pooled,
        image_px=1024,
        draw=settings,
    )


MODELS: dict[str, tuple[str, dict[str, Any], float, DecoderSizes]] = {
    "3 medium": (SD3, SD3_MEDIUM, 2.0, sizes(333, 2048, draw(28, 7.0))),
    "3.5 medium": (SD3, SD35_MEDIUM, 2.5, sizes(333, 2048, draw(40, 4.5))),
    "3.5 large": (SD3, SD35_LARGE, 8.1, sizes(333, 2048, draw(28, 3.5))),
    "dev": (FLUX, FLUX_DEV, 11.9, sizes(512, 768, draw(50, 3.5))),
    "schnell": (FLUX, FLUX_SCHNELL, 11.9, sizes(512, 768, draw(4, 1.0))),
    "Sana 1.6B": (
        SANA,
        SANA_1600M,
        1.6,
        DecoderSizes(
            condition_length=300,
            condition_width=2304,
            image_px=1024,
            draw=DrawSettings(steps=20, guidance_scale=4.5, scheduler="dpm-solver++"),
        ),
    ),
    "ERNIE-Image": (
        ERNIE,
        ERNIE_IMAGE,
        8.0,
        DecoderSizes(condition_length=256, condition_width=3072, image_px=1024, draw=draw(50, 4.0)),
    ),
}


def write(folder: Path, *, pipeline: str, transformer: dict[str, Any]) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    parts = {"transformer": transformer, "vae": VAES.get(pipeline, {**VAE, "sample_size": 1024}), "text_encoder": CLIP}
    for name, config in parts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model", MODELS)
def test_sizes_and_draw_settings_fit_the_published_model(tmp_path: Path, model: str) -> None:
    pipeline, transformer, billions, expected = MODELS[model]
    write(tmp_path, pipeline=pipeline, transformer=transformer)
    assert find_family(tmp_path).read_sizes(tmp_path) == expected
    with torch.device("meta"):
        denoiser = getattr(diffusers, transformer["_class_name"]).from_config(transformer)
    # With the fixed table of positions, which the weights file holds too: a tenth of 3.5 medium.
    stored = sum(values.numel() for values in denoiser.state_dict().values())
    assert stored / 1e9 == pytest.approx(billions, abs=0.1)


@pytest.mark.parametrize(
    ("pipeline", "transformer", "said"),
    [
        (SD3, {"_class_name": "FluxTransformer2DModel"}, "is a FluxTransformer2DModel"),
        (FLUX, {**FLUX_DEV, "in_channels": 384}, "384 channels"),
        (ERNIE, {**ERNIE_IMAGE, "in_channels": 64}, "64 channels"),
        (SANA, SD3_MEDIUM, "is a SD3Transformer2DModel"),
        (SANA, {**SANA_1600M, "guidance_embeds": True}, "a distilled Sana"),
    ],
)
def test_a_transformer_of_another_kind_is_refused(
    tmp_path: Path, pipeline: str, transformer: dict[str, Any], said: str
) -> None:
    write(tmp_path, pipeline=pipeline, transformer=transformer)
    with pytest.raises(ModelFolderError, match=said):
        find_family(tmp_path).read_sizes(tmp_path)


UNET_OF = {
    "StableDiffusionPipeline": {"sample_size": 64, "in_channels": 4, "cross_attention_dim": 1024},
    "StableDiffusionXLPipeline": {
        "sample_size": 64,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
    },
}
SD, XL = UNET_OF
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"


def write_unet(folder: Path, pipeline: str, *, unet: dict[str, Any], scheduler: dict[str, Any]) -> None:
    text = {"max_position_embeddings": 77, "hidden_size": 1024, "projection_dim": 1280}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    parts = {
        "unet": UNET_OF[pipeline] | unet,
        "vae": {**VAE, "latent_channels": 4},
        "text_encoder": text,
        "text_encoder_2": text,
    }
    for name, config in parts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


@pytest.mark.parametrize(
    ("pipeline", "unet", "scheduler", "expected"),
    [
        (XL, {}, {"_class_name": EULER, "timestep_spacing": "leading"}, (50, 5.0, "euler")),
        (XL, {}, {"_class_name": ANCESTRAL, "timestep_spacing": "leading"}, (50, 5.0, "euler")),
        (XL, {}, {"_class_name": ANCESTRAL, "timestep_spacing": "trailing"}, (1, 1.0, "euler-ancestral")),
        (
            XL,
            {},
            {"_class_name": EULER, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
            (50, 5.0, "euler"),
        ),
        (XL, {"time_cond_proj_dim": 256}, {"_class_name": "LCMScheduler"}, (4, 8.5, "lcm")),
        (SD, {}, {"_class_name": "PNDMScheduler"}, (50, 7.5, "ddim")),
        (SD, {}, {"_class_name": EULER, "timestep_spacing": "trailing"}, (1, 1.0, "euler")),
        (
            SD,
            {},
            {"_class_name": EULER, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
            (50, 7.5, "ddim"),
        ),
    ],
)
def test_models_of_few_steps_are_known_by_their_scheduler(
    tmp_path: Path,
    pipeline: str,
    unet: dict[str, Any],
    scheduler: dict[str, Any],
    expected: tuple[int, float, str],
) -> None:
    write_unet(tmp_path, pipeline, unet=unet, scheduler=scheduler)
    found = find_family(tmp_path).read_sizes(tmp_path).draw
    assert (found.steps, found.guidance_scale, found.scheduler) == expected


@pytest.mark.parametrize("pipeline", UNET_OF)
@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "is a EDMDPMSolverMultistepScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is a FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": EULER, "prediction_type": "sample"}, "predicts sample"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, "flow_prediction"),
    ],
)
def test_other_noise_and_other_predictions_are_refused(
    tmp_path: Path, pipeline: str, scheduler: dict[str, Any], said: str
) -> None:
    """They would be drawn and trained as another noise, without a word."""
    write_unet(tmp_path, pipeline, unet={}, scheduler=scheduler)
    family = find_family(tmp_path)
    for read in (family.read_sizes, family.load_noise):
        with pytest.raises(ModelFolderError, match=f"{said}.*epsilon or v_prediction"):
            read(tmp_path)


def test_a_sampler_is_the_one_that_is_named_whichever_the_folder_has(tmp_path: Path) -> None:
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    write_unet(tmp_path, SD, unet={}, scheduler=scheduler)
    noise = find_family(tmp_path).load_noise(tmp_path)
    for name, sampler in noise.samplers.items():
        if sampler.scheduler is diffusers.DPMSolverMultistepScheduler:
            found = noise.new_sampler(name).config.algorithm_type
            assert found.startswith("sde") == sampler.adds_noise, "noise that no seed fixes"


def test_a_vae_with_the_old_names_of_attention_is_whole(tmp_path: Path) -> None:
    """Stable Diffusion 1.x was published with them; a weight that is missing is another thing."""
    torch.manual_seed(0)
    vae = make_vae()
    vae.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    assert any(".proj_attn." in name for name in weights)
    save_file(weights, file, {"format": "pt"})
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        found, expected = (one.decode(latents).sample for one in (load_part(tmp_path, "vae").eval(), vae.eval()))
    torch.testing.assert_close(found, expected)
    del weights["encoder.mid_block.attentions.0.key.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelFolderError, match="lacks the weights encoder.mid_block.attentions.0.to_k.weight"):
        load_part(tmp_path, "vae")
