"""Crispness tells sharp from blurred, and a sprite is found where it stands."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from minigpt5.storybook.crispness import crispness, find_sprite
from minigpt5.storybook.scenes import IMAGE_PX, draw_scene, scene_at, sprite_boxes

SCENES = [scene_at(index, seed=21, split="heldout", held_out_pairs=None) for index in range(30)]
HALF = IMAGE_PX // 2


def blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    return np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def mean_crispness(pictures: list[tuple[np.ndarray, str]], *, with_colour: bool = False) -> float:
    return float(np.mean([crispness(pixels, name, with_colour=with_colour) for pixels, name in pictures]))


def test_crispness_tells_true_scenes_from_blurred_ones_and_from_others() -> None:
    pictures = [(draw_scene(scene), scene.who) for scene in SCENES]
    true = mean_crispness(pictures)
    mild, strong = (mean_crispness([(blurred(pixels, r), who) for pixels, who in pictures]) for r in (1.5, 3))
    other = mean_crispness([(pixels, "balloon" if who != "balloon" else "bus") for pixels, who in pictures])
    assert 0.89 < true < 0.95
    assert strong < mild - 0.05 < true - 0.1
    assert other < mild


def test_with_colour_a_tint_counts_and_without_it_does_not() -> None:
    pictures = [(draw_scene(scene), scene.who) for scene in SCENES[:20]]
    grey = [
        (np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8), who) for pixels, who in pictures
    ]
    shifted = [((pixels * 0.75).astype(np.uint8) + np.uint8([50, 0, 0]), who) for pixels, who in pictures]
    assert mean_crispness(shifted) == pytest.approx(mean_crispness(pictures), abs=0.01)
    assert mean_crispness(shifted, with_colour=True) < mean_crispness(pictures, with_colour=True) - 0.05
    assert mean_crispness(grey, with_colour=True) < mean_crispness(pictures, with_colour=True) - 0.15
    assert 0.93 < mean_crispness(pictures, with_colour=True) < 0.97


def test_crispness_is_at_most_one_and_zero_on_nothing() -> None:
    assert crispness(np.zeros((128, 128, 3), np.uint8), "fox") == pytest.approx(0, abs=0.01)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert 0 <= crispness(noise, "fox") < 0.5


def test_a_sprite_is_found_where_it_stands_to_the_pixel() -> None:
    for scene in SCENES[:8]:
        for name, (left, top, right, bottom) in sprite_boxes(scene).items():
            columns = (0, HALF + 4) if left < HALF - 4 else (HALF - 4, IMAGE_PX)
            found = find_sprite(draw_scene(scene), name, columns=columns)
            assert (found.left, found.top, found.side_px) == (left, top, max(right - left, bottom - top)), name
            assert found.correlation > 0.95


def test_a_sprite_is_looked_for_in_the_columns_alone() -> None:
    scene = SCENES[0]
    columns = (HALF, IMAGE_PX) if scene.side == "left" else (0, HALF)
    found = find_sprite(draw_scene(scene), scene.who, columns=columns)
    assert found.correlation < 0.7
    assert found.left >= columns[0]


def test_a_sprite_that_is_wider_than_the_columns_is_not_found() -> None:
    assert find_sprite(draw_scene(SCENES[0]), SCENES[0].who, columns=(0, 8)).correlation == -1


def test_larger_pictures_are_held_to_larger_sprites() -> None:
    larger = [(draw_scene(scene, scale=2), scene.who) for scene in SCENES[:10]]
    soft = [(blurred(pixels, 3), who) for pixels, who in larger]
    assert 0.89 < mean_crispness(larger) < 0.96
    assert mean_crispness(soft) < mean_crispness(larger) - 0.05
