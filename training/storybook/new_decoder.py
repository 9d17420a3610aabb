"""The parts of the picture world's decoder before they are trained."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel


def new_storybook_vae() -> AutoencoderKL:
    """128 px -> 16 x 16 x 8, 2.6 M parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def new_storybook_unet(condition_width: int) -> UNet2DConditionModel:
    """17.4 M parameters on 16 x 16 x 8 latents, cross-attention at all three levels."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(96, 160, 224),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=condition_width,
        attention_head_dim=4,  # diffusers reads it as the number of heads here
        norm_num_groups=16,
    )


def new_storybook_noise_schedule() -> DDIMScheduler:
    """v-prediction with zero terminal SNR (arXiv 2305.08891)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
