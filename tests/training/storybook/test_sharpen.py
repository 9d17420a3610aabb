"""Stage "sharpen": its target is what was drawn before, crisp; what it changes, and what it holds on to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from minigpt5.errors import TrainingError
from minigpt5.model.decoders.diffusion import Diffusion
from minigpt5.model.folder import save_diffusion
from minigpt5.model.pixels import to_tensor
from minigpt5.storybook.scenes import draw_scene
from minigpt5.types import DISTILLED
from tests.helpers.tiny import SomeStates, tiny_config, tiny_diffusion, trained_parts
from training.data.batches import Batch, StageData, batch_at
from training.presets import override
from training.storybook.examples import StorybookExamples, WeightedScene
from training.storybook.presets import STORYBOOK
from training.storybook.sharpen import DrawnBatch, SharpenObjective, SharpenStage, detail_loss, drawn_target
from training.storybook.sprites import SPRITE_WEIGHT, cleared, find_sprites, redrawn, sprites_of
from training.weight_sources import WeightSources

PRESET = override(STORYBOOK["sharpen"], ["batch_size=3", "replay.steps=2", "replay.min_size=4"])


def new_sharpen() -> tuple[Diffusion, SharpenObjective]:
    diffusion = tiny_diffusion(tiny_config(), is_distilled=True)
    for unet in (diffusion.denoiser, diffusion.distilled):
        unet.register_to_config(sample_size=32)  # pictures of the storybook's size
    return diffusion, SharpenObjective(diffusion, SomeStates(), PRESET)  # type: ignore[arg-type]


def batch_of(step: int) -> Batch[WeightedScene]:
    torch.manual_seed(step)
    return dataclasses.replace(batch_at(StorybookExamples(PRESET), 3 * step, 3), step=step)


def pictures_and_masks() -> tuple[torch.Tensor, torch.Tensor]:
    scenes = [example.scene for example in batch_of(0).examples]
    pixels_BCYX = to_tensor(np.stack([draw_scene(scene) for scene in scenes]))
    masks = [[sprite.mask() for sprite in sprites_of(scene)] for scene in scenes]
    return pixels_BCYX, torch.tensor(np.array(masks))


def test_detail_forgives_a_tint_but_no_blur_and_no_other_place() -> None:
    pixels_BCYX, masks_BNYX = pictures_and_masks()
    tinted_BCYX = 0.5 * pixels_BCYX + torch.tensor([0.2, -0.1, 0.0])[:, None, None]
    assert detail_loss(tinted_BCYX, pixels_BCYX, masks_BNYX).item() == pytest.approx(0, abs=1e-5)
    blurred_BCYX = torch.nn.functional.avg_pool2d(pixels_BCYX, 5, stride=1, padding=2)
    soft, elsewhere = (
        detail_loss(moved_BCYX, pixels_BCYX, masks_BNYX).item() for moved_BCYX in (blurred_BCYX, pixels_BCYX.roll(9, 3))
    )
    assert 0.05 < soft < elsewhere
    assert detail_loss(-pixels_BCYX, pixels_BCYX, masks_BNYX).item() == pytest.approx(2, abs=1e-5)


def test_detail_is_of_the_sprites_that_are_there() -> None:
    pixels_BCYX, masks_BNYX = pictures_and_masks()
    flat_BCYX = torch.zeros_like(pixels_BCYX).requires_grad_(True)
    detail_loss(flat_BCYX, pixels_BCYX, masks_BNYX).backward()
    assert flat_BCYX.grad is not None and flat_BCYX.grad.isfinite().all()
    masks_BNYX[:, 0] = False
    half_BCYX = torch.where(masks_BNYX[:, 1:], pixels_BCYX, -pixels_BCYX)
    assert detail_loss(half_BCYX, pixels_BCYX, masks_BNYX).item() == pytest.approx(0, abs=1e-5)
    assert detail_loss(half_BCYX, pixels_BCYX, torch.zeros_like(masks_BNYX)).item() == 0


def test_the_distilled_unet_and_the_way_back_learn_and_nothing_else() -> None:
    diffusion, objective = new_sharpen()
    losses = objective(batch_of(0), 0.0)
    assert set(losses) >= {"loss", "detail", "composition"}
    (losses["loss"] - losses["composition"]).backward()
    through_pixels = [p.grad.abs().max() for p in diffusion.denoiser_for(DISTILLED).parameters() if p.grad is not None]
    assert max(through_pixels) > 1e-6
    parts = trained_parts(diffusion)
    assert {name.split(".")[0] for name in parts} == {"distilled", "vae"}
    assert {name for name in parts if name.startswith("vae")} == {"vae.decoder", "vae.post_quant_conv"}
    assert not any(parameter.requires_grad for parameter in objective.before.parameters())


def test_the_target_is_the_picture_of_before_and_the_first_call_is_held_to_it() -> None:
    """Whatever has been learnt since; the calls between are of what is there now."""
    diffusion, objective = new_sharpen()
    batch = batch_of(0)

    def draw() -> DrawnBatch:
        torch.manual_seed(4)
        return objective._draw(batch.examples)

    first = draw()
    assert objective(batch, 0.0)["composition"].item() == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        for parameter in diffusion.vae.decoder.parameters():
            parameter.mul_(1.1)
    again = vars(draw())
    assert all(torch.equal(part, again[name]) for name, part in vars(first).items()), "the way back of before"
    with torch.no_grad():
        for parameter in diffusion.distilled.parameters():
            parameter.mul_(1.1)
    moved = draw()
    assert torch.equal(moved.noise_BCYX, first.noise_BCYX) and torch.equal(moved.composed_BCYX, first.composed_BCYX)
    assert not torch.equal(moved.noisy_BCYX, first.noisy_BCYX)
    assert objective(batch, 0.0)["composition"].item() > 1e-6


def test_steps_between_fresh_ones_learn_from_the_replay_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    _, objective = new_sharpen()
    drawn: list[int] = []
    draw = objective._draw
    monkeypatch.setattr(objective, "_draw", lambda scenes: drawn.append(len(scenes)) or draw(scenes))
    for step in range(5):
        objective(batch_of(step), 0.0)
    assert drawn == [2, 2, 2], "steps 0, 1 and 3; the others had 4 pictures or more to replay"
    objective.eval()
    objective(batch_of(5), 0.0)
    assert drawn == [2, 2, 2, 2], "validation is of fresh pictures"


@pytest.mark.parametrize(("size", "expected"), [(1, [0, 0, 0]), (2, [0, 1, 1]), (3, [1, 1, 1]), (8, [2, 3, 3])])
def test_a_third_is_true_however_small_a_workers_share(
    size: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One picture is always drawn."""
    _, objective = new_sharpen()
    first: list[int] = []
    draw = objective._drawn
    monkeypatch.setattr(objective, "_drawn", lambda batch, num: first.append(num) or draw(batch, num))
    for step in range(3):
        losses = objective(dataclasses.replace(batch_at(StorybookExamples(PRESET), size * step, size), step=step), 0.0)
        assert losses["loss"].isfinite()
    assert first == expected


def test_a_target_has_no_halos_where_both_sprites_are_found() -> None:
    """Without one of them nothing is cleared: it would be taken for what is behind the other."""
    scene = batch_of(0).examples[0].scene
    soft = np.array(Image.fromarray(draw_scene(scene)).filter(ImageFilter.GaussianBlur(1.5)))
    sprites = find_sprites(soft, scene)
    target = drawn_target(soft, scene)
    assert np.array_equal(target.pixels_BYXC[0].numpy(), redrawn(cleared(soft, sprites), sprites))
    assert target.masks_BNYX[0].any((1, 2)).all() and (target.weight_B1YX == SPRITE_WEIGHT).any()
    left = slice(0, 64) if scene.side == "left" else slice(64, 128)
    soft[:, left] = soft[:, left].mean(1, keepdims=True)  # no character any more
    target = drawn_target(soft, scene)
    assert (
        target.masks_BNYX[0].any((1, 2)).tolist() == [True, False] and not (target.weight_B1YX == SPRITE_WEIGHT).any()
    )
    (sprite,) = find_sprites(soft, scene)
    assert np.array_equal(target.pixels_BYXC[0].numpy()[:, left], soft[:, left])
    assert np.array_equal(target.pixels_BYXC[0].numpy(), redrawn(soft, [sprite]))


def test_it_learns_what_it_is_taught() -> None:
    diffusion, objective = new_sharpen()
    batch = batch_of(3)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        loss = objective(batch, 0.0)["loss"]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0], losses


def test_a_model_that_was_not_distilled_is_refused(tmp_path: Path) -> None:
    save_diffusion(tiny_diffusion(tiny_config()), tmp_path)
    with pytest.raises(TrainingError, match="run stage distill first"):
        SharpenStage(
            PRESET,
            WeightSources(runs=tmp_path, decoder=tmp_path),
            StageData(training=StorybookExamples(PRESET), validation=None),
        )
