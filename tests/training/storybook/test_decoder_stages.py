"""Stages "decoder" and "distill": what they learn from, and that they change nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt5.codec import to_json
from minigpt5.engine.denoising import Denoising, advance
from minigpt5.errors import TrainingError
from minigpt5.model.decoders.diffusion import Diffusion
from minigpt5.model.decoders.multistep_scheduler import NUM_LEVELS
from minigpt5.model.folder import DISTILLED_DRAW, save_diffusion
from minigpt5.types import DISTILLED, DrawSettings
from tests.helpers.tiny import SomeStates, tiny_config, tiny_diffusion, trained_parts
from training.data.batches import StageData, batch_at
from training.presets import override
from training.stages.distill import DistillObjective, DistillStage
from training.storybook.decoder import DecoderObjective, DecoderStage
from training.storybook.examples import StorybookExamples
from training.storybook.presets import STORYBOOK
from training.storybook.vae import LATENT_NOISE
from training.weight_sources import WeightSources

NO_EXAMPLES = StageData(training=StorybookExamples(STORYBOOK["decoder"]), validation=None)


def test_a_stage_starts_from_the_stages_before_it(tmp_path: Path) -> None:
    """Once all have run, one that is run again takes nothing from itself or from what came after it."""
    for stage in ("vae", "unet", "distill", "decoder", "sharpen", "upscale"):
        for part in ("vae", "unet")[: 1 if stage == "vae" else 2]:
            (tmp_path / stage / "model" / part).mkdir(parents=True)
    sources = WeightSources(runs=tmp_path)
    stages = ("vae", "unet", "distill", "decoder", "sharpen", "upscale", "align")
    found = {stage: sources.find("vae", stage=stage) for stage in stages}
    came_from = [folder.parent.name if folder else None for folder in found.values()]
    assert came_from == [None, *stages[:-1]]
    with pytest.raises(TrainingError, match="no unet to start from"):
        WeightSources(runs=tmp_path / "empty").need("unet", stage="distill")


def test_the_decoder_alone_learns_from_latents_that_the_unet_cleaned() -> None:
    preset = dataclasses.replace(STORYBOOK["decoder"], batch_size=2)
    diffusion = tiny_diffusion(tiny_config(), is_distilled=True)
    diffusion.denoiser.requires_grad_(True)  # as it is loaded
    objective = DecoderObjective(diffusion, SomeStates(), preset)  # type: ignore[arg-type]
    torch.manual_seed(0)
    losses = objective(dataclasses.replace(batch_at(StorybookExamples(preset), 0, 2), step=0), 0.0)
    losses["loss"].backward()
    assert trained_parts(diffusion) == {"vae.decoder", "vae.post_quant_conv"}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_share_of_any_size_has_all_kinds_alike(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = dataclasses.replace(STORYBOOK["decoder"], batch_size=size)
    objective = DecoderObjective(tiny_diffusion(tiny_config()), SomeStates(), preset)  # type: ignore[arg-type]
    seen: list[int] = []
    monkeypatch.setattr(
        objective, "_cleaned", lambda pixels, condition, kinds: seen.extend(kinds.tolist()) or pixels[:, :, ::4, ::4]
    )
    monkeypatch.setattr(
        objective.diffusion, "to_raw_pixels", lambda latents: latents.repeat_interleave(4, 2).repeat_interleave(4, 3)
    )
    for step in range(3):
        objective(dataclasses.replace(batch_at(StorybookExamples(preset), 0, size), step=step), 0.0)
    assert sorted(seen) == sorted([0, 1, 2] * size)


def test_a_third_of_the_pictures_each_is_left_cleaned_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = dataclasses.replace(STORYBOOK["decoder"], batch_size=7)
    diffusion = tiny_diffusion(tiny_config(), is_distilled=True)
    objective = DecoderObjective(diffusion, SomeStates(), preset)  # type: ignore[arg-type]
    seen: dict[str, list[int]] = {}

    def note(latents: torch.Tensor, *_: object, timesteps: torch.Tensor, sampler: str, **__: object) -> torch.Tensor:
        seen[sampler] = timesteps.tolist()
        return latents + (2 if sampler == DISTILLED else 1)

    monkeypatch.setattr(diffusion, "predict_x0", note)
    pixels_BCYX = torch.rand(7, 3, 32, 32)
    kind_B = torch.arange(7) % 3
    moved = objective._cleaned(pixels_BCYX, torch.zeros(7, 1, 1), kind_B) - diffusion.to_latents(pixels_BCYX)
    assert moved.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0, 1, 2, 0, 1, 2, 0], abs=0.02)
    assert moved[0].std().item() == pytest.approx(LATENT_NOISE, rel=0.2)
    assert seen[DISTILLED] == [499, 499] and max(seen["ddim"]) < preset.last_timestep


def test_a_model_that_was_not_distilled_is_refused(tmp_path: Path) -> None:
    save_diffusion(tiny_diffusion(tiny_config()), tmp_path)
    with pytest.raises(TrainingError, match="run stage distill first"):
        DecoderStage(STORYBOOK["decoder"], WeightSources(runs=tmp_path, decoder=tmp_path), NO_EXAMPLES)


def test_a_crop_is_decoded_from_the_latents_of_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = dataclasses.replace(STORYBOOK["decoder"], batch_size=2)
    diffusion = tiny_diffusion(tiny_config())
    objective = DecoderObjective(diffusion, SomeStates(), preset)  # type: ignore[arg-type]
    # The picture itself, shrunk to the latents' size, in the place of latents: "decoding" makes it large again.
    monkeypatch.setattr(objective, "_cleaned", lambda pixels, condition, kinds: pixels[:, :, ::4, ::4])
    monkeypatch.setattr(
        diffusion, "to_raw_pixels", lambda latents: latents.repeat_interleave(4, 2).repeat_interleave(4, 3)
    )
    batch = dataclasses.replace(batch_at(StorybookExamples(preset), 0, 2), step=0)
    right = objective(batch, 0.0)["l1"].item()
    monkeypatch.setattr(objective, "_cleaned", lambda pixels, condition, kinds: pixels[:, :, ::4, ::4].roll(4, dims=3))
    assert right < 0.5 * objective(batch, 0.0)["l1"].item()
    assert np.asarray([scene.corners for scene in batch.examples]).shape == (2, 2, 2)


def new_distill(teacher_steps: int) -> tuple[Diffusion, DistillObjective]:
    settings = ["batch_size=3", f"teacher_steps={teacher_steps}", "replay.steps=3", "replay.min_size=6"]
    preset = override(STORYBOOK["distill"], settings)
    diffusion = tiny_diffusion(tiny_config(), is_distilled=True)
    objective = DistillObjective(diffusion, SomeStates(), preset, guidance_scale=2.0, guidance_rescale=0.7)  # type: ignore[arg-type]
    return diffusion, objective


@pytest.mark.parametrize("teacher_steps", [1, 2, 5])
def test_a_step_that_meets_its_target_ends_where_the_teachers_steps_do(teacher_steps: int) -> None:
    """Against the samplers that serve: guided steps of the UNet on one side, one unguided step on the other."""
    diffusion, objective = new_distill(teacher_steps)
    encode = SomeStates()
    condition_QD, null_1QD = encode(["a fox"])[0], encode([""])
    guided = DrawSettings(steps=NUM_LEVELS * teacher_steps, guidance_scale=objective.guidance_scale, scheduler="ddim")
    teacher = Denoising(diffusion, condition_QD, seed=1, draw=guided, guidance_rescale=objective.guidance_rescale)
    unguided = dataclasses.replace(DISTILLED_DRAW, steps=NUM_LEVELS)
    student = Denoising(diffusion, condition_QD, seed=1, draw=unguided, guidance_rescale=0.0)
    for number in range(NUM_LEVELS):
        index_B = torch.tensor([number * teacher_steps])
        with torch.no_grad():
            end_BCYX = objective.run_teacher(student.latents_1CYX, condition_QD[None], index_B)
            velocity_BCYX = objective.target(student.latents_1CYX, end_BCYX, index_B)
        student.take(velocity_BCYX, None)
        for _ in range(teacher_steps):
            advance(diffusion, [teacher], null_1QD)
        assert torch.allclose(student.latents_1CYX, teacher.latents_1CYX, atol=1e-3), number


def test_the_teacher_is_guided_as_the_start_folder_says(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config(), guidance_rescale=0.1, draw=DrawSettings(guidance_scale=1.5))
    save_diffusion(tiny_diffusion(config), tmp_path / "decoder")
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    stage = DistillStage(STORYBOOK["distill"], WeightSources(runs=tmp_path / "runs", start=tmp_path), NO_EXAMPLES)
    assert (stage.objective.guidance_scale, stage.objective.guidance_rescale) == (1.5, 0.1)


def test_the_teachers_timesteps_leave_the_shared_noise_schedule_alone() -> None:
    diffusion, objective = new_distill(5)
    assert objective.timesteps.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, -1]
    assert len(diffusion.noise_schedule.timesteps) == 1000


def test_steps_between_fresh_ones_learn_from_what_the_teacher_did(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion, objective = new_distill(2)
    asked: list[int] = []
    ask_teacher = objective._ask_teacher
    monkeypatch.setattr(objective, "_ask_teacher", lambda batch: asked.append(batch.step) or ask_teacher(batch))
    losses = []
    for step in range(9):
        torch.manual_seed(step)
        batch = batch_at(StorybookExamples(objective.preset), 3 * step, 3)
        losses.append(objective(dataclasses.replace(batch, step=step), 0.0)["loss"].item())
    assert asked == [0, 1, 3, 7]
    assert len(set(losses)) == 9, "each step draws samples of its own"


def test_the_distilled_unet_alone_learns_and_comes_nearer_to_its_teacher() -> None:
    diffusion, objective = new_distill(2)
    batch = batch_at(StorybookExamples(objective.preset), 0, 3)
    optimizer = torch.optim.AdamW(objective.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        torch.manual_seed(0)
        loss = objective(dataclasses.replace(batch, step=3), 0.0)["loss"]
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 1:
            assert {name.split(".")[0] for name in trained_parts(diffusion)} == {"distilled"}
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0], losses
