"""Stage "upscale": what the second decoder learns from, that nothing else changes, and what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt5.errors import TrainingError
from minigpt5.model.decoders.stable_diffusion import StableDiffusion
from minigpt5.model.decoders.upscaling import UpscalingDecoder, load_upscaling
from minigpt5.model.folder import save_diffusion, save_part
from minigpt5.storybook.crispness import crispness
from minigpt5.storybook.scenes import draw_scene, scene_at
from minigpt5.types import UPSCALING_FOLDER
from tests.helpers.tiny import SomeStates, tiny_config, tiny_diffusion, trained_parts
from training.data.batches import StageData, batch_at
from training.presets import override
from training.storybook.examples import StorybookExamples
from training.storybook.presets import STORYBOOK, UpscalePreset
from training.storybook.sharpen import drawn_target
from training.storybook.sprites import find_sprites
from training.storybook.upscale import UpscaledBatch, UpscaleObjective, UpscaleStage
from training.weight_sources import WeightSources

PRESET = override(STORYBOOK["upscale"], ["batch_size=3", "replay.steps=1", "replay.min_size=2"])
assert isinstance(PRESET, UpscalePreset)


def some_pictures(latents_BCYX: torch.Tensor, *, scale: int = 1) -> torch.Tensor:
    """Scenes, whatever the latents are."""
    scenes = [scene_at(index, seed=PRESET.seed) for index in range(len(latents_BCYX))]
    pixels = np.stack([draw_scene(scene, scale=scale) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def new_objective(monkeypatch: pytest.MonkeyPatch) -> UpscaleObjective:
    """Of a tiny model that draws pictures of 128 pixels."""
    diffusion = tiny_diffusion(tiny_config(), is_distilled=True)
    for part in (diffusion.denoiser, diffusion.distilled):
        part.register_to_config(sample_size=32)
    monkeypatch.setattr(StableDiffusion, "to_pixels", lambda self, latents, scale=1: some_pictures(latents))
    torch.manual_seed(0)
    upscaling = UpscalingDecoder.from_vae(diffusion.vae)
    return UpscaleObjective(diffusion, upscaling, SomeStates(), PRESET).train()  # type: ignore[arg-type]


def test_the_second_decoder_alone_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = new_objective(monkeypatch)
    losses = objective(batch_at(StorybookExamples(PRESET), 0, 3), 0.0)
    losses["loss"].backward()
    assert set(losses) == {"loss", "l1", "mse", "gradient", "detail", "features"}
    assert not trained_parts(objective.diffusion)
    assert all(parameter.grad is not None for parameter in objective.upscaling.parameters())


def test_two_thirds_are_true_scenes_drawn_larger_and_drawn_ones_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, seen = new_objective(monkeypatch), []
    monkeypatch.setattr(
        UpscaledBatch, "cat", classmethod(lambda cls, parts: seen.append([len(one) for one in parts]) or parts[-1])
    )
    source = StorybookExamples(PRESET)
    batch = batch_at(source, 0, 3)
    objective(batch, 0.0)
    assert seen == [[2, 1]]
    (true,) = [objective._true(batch.examples[:1])]
    assert (true.pixels_BYXC[0].numpy() == draw_scene(batch.examples[0].scene, scale=2)).all()
    assert true.masks_BNYX.shape == (1, 2, 256, 256) and true.weight_B1YX.shape == (1, 1, 256, 256)
    assert true.latents_BCYX.shape == (1, 4, 32, 32)
    assert len(objective._replay_buffer) == 1


def test_the_target_of_a_drawn_picture_has_its_sprites_in_twice_the_size() -> None:
    for scene in (scene_at(index, seed=5) for index in range(4)):
        pixels = draw_scene(scene)
        target = drawn_target(pixels, scene, scale=2)
        large = target.pixels_BYXC[0].numpy()
        assert large.shape == (256, 256, 3) and target.masks_BNYX.any(dim=(2, 3)).all()
        for key in (scene.who, scene.what):
            resampled = np.array(Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC))
            assert crispness(large, key) > max(0.75, crispness(resampled, key))
        apart = np.abs(np.array(Image.fromarray(large).reduce(2), int) - pixels).mean()
        assert apart < 6, "the same picture, at the same places"
        assert len(find_sprites(pixels, scene)) == 2


def test_the_stage_writes_a_decoder_folder_that_a_later_run_goes_on_from(tmp_path: Path) -> None:
    diffusion = tiny_diffusion(tiny_config(), is_distilled=True)
    save_diffusion(diffusion, tmp_path / "sharpen" / "model")
    data = StageData(training=StorybookExamples(PRESET), validation=None)
    stage = UpscaleStage(PRESET, WeightSources(runs=tmp_path), data)
    with torch.no_grad():
        stage.upscaling.decoder.conv_out.bias += 0.25
    stage.save(tmp_path / "upscale" / "model")
    names = {path.name for path in (tmp_path / "upscale" / "model").iterdir()}
    assert names == {"vae", "unet", "unet_distilled", "scheduler", UPSCALING_FOLDER}
    again = UpscaleStage(
        PRESET, WeightSources(runs=tmp_path / "none", decoder=tmp_path / "upscale" / "model"), data
    ).upscaling
    written = load_upscaling(tmp_path / "upscale" / "model" / UPSCALING_FOLDER)
    for one in (again, written):
        torch.testing.assert_close(one.decoder.conv_out.bias, stage.upscaling.decoder.conv_out.bias, atol=1e-3, rtol=0)


def test_another_scale_than_that_of_the_known_decoder_is_said(tmp_path: Path) -> None:
    diffusion = tiny_diffusion(tiny_config(), is_distilled=True)
    save_diffusion(diffusion, tmp_path)
    save_part(UpscalingDecoder.from_vae(diffusion.vae), tmp_path / UPSCALING_FOLDER)
    data = StageData(training=StorybookExamples(PRESET), validation=None)
    sources = WeightSources(runs=tmp_path / "none", decoder=tmp_path)
    with pytest.raises(TrainingError, match="scale is 4 but the decoder in .* has 2: set scale=2"):
        UpscaleStage(override(PRESET, ["scale=4"]), sources, data)
