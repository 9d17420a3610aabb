"""Scenes are pure functions of their arguments, keep splits and pairs apart, and look as their facts say."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from minigpt5.storybook import scenes
from minigpt5.storybook.scenes import CHARACTERS, OBJECTS, PLACES, SKY, SPRITE_PX, TIMES, Scene, Split

SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")


def some_scenes(num: int, **options: object) -> list[Scene]:
    return [scenes.scene_at(index, seed=3, **options) for index in range(num)]  # type: ignore[arg-type]


def test_the_same_arguments_give_the_same_scene_and_picture() -> None:
    first, again = (scenes.scene_at(5, seed=3) for _ in range(2))
    assert first == again
    np.testing.assert_array_equal(scenes.draw_scene(first), scenes.draw_scene(again))
    assert list(islice(scenes.scenes(3), 6))[5] == first


def test_splits_seeds_and_indices_give_other_scenes() -> None:
    drawn = [scenes.scene_at(index, seed=seed, split=split) for index in (0, 1) for seed in (0, 1) for split in SPLITS]
    assert len({scene.seed for scene in drawn}) == len(drawn)


def test_held_out_pairs_are_a_third_and_come_only_where_they_are_asked_for() -> None:
    pairs = [(who, what) for who in CHARACTERS for what in OBJECTS]
    assert sum(scenes.is_held_out(*pair) for pair in pairs) * 3 == len(pairs)
    assert scenes.is_held_out("fox", "house") and not scenes.is_held_out("fox", "castle")
    for held_out_pairs, expected in ((False, {False}), (True, {True}), (None, {False, True})):
        drawn = some_scenes(60, held_out_pairs=held_out_pairs)
        assert {scenes.is_held_out(scene.who, scene.what) for scene in drawn} == expected


def test_every_fact_is_drawn_alike_often() -> None:
    drawn = some_scenes(3000)
    for name, values in (("who", CHARACTERS), ("what", OBJECTS), ("place", PLACES), ("time", TIMES)):
        counts = [sum(getattr(scene, name) == value for scene in drawn) for value in values]
        assert min(counts) > 0.6 * len(drawn) / len(values), name
    assert 0.45 < np.mean([scene.side == "left" for scene in drawn]) < 0.55


def test_the_character_stands_on_its_side_and_sprites_keep_their_size() -> None:
    for scene in some_scenes(100):
        boxes = scenes.sprite_boxes(scene)
        middles = {name: (box[0] + box[2]) / 2 for name, box in boxes.items()}
        assert (middles[scene.who] < 64) == (scene.side == "left")
        assert (middles[scene.what] < 64) == (scene.side == "right")
        for left, top, right, bottom in boxes.values():
            assert 0 <= left < right <= scenes.IMAGE_PX and 0 <= top < bottom <= scenes.IMAGE_PX
            assert SPRITE_PX[0] <= max(right - left, bottom - top) <= SPRITE_PX[1]


def test_a_picture_is_128_px_of_bytes() -> None:
    picture = scenes.draw_scene(some_scenes(1)[0])
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8


@pytest.mark.parametrize("time", TIMES)
def test_the_sky_has_the_colour_of_its_time(time: str) -> None:
    for scene in some_scenes(20):
        top_row = scenes.draw_scene(replace(scene, time=time))[0].astype(int)
        assert (np.abs(np.median(top_row, axis=0) - SKY[time][0]) <= 15).all()


@pytest.mark.parametrize("name", ["who", "what", "place", "time", "side"])
def test_another_fact_is_another_picture(name: str) -> None:
    values = {"who": CHARACTERS, "what": OBJECTS, "place": PLACES, "time": TIMES, "side": ("left", "right")}[name]
    scene = some_scenes(1)[0]
    drawn = [scenes.draw_scene(replace(scene, **{name: value})).tobytes() for value in values]  # type: ignore[arg-type]
    assert len(set(drawn)) == len(values)


@pytest.mark.parametrize("name", [*CHARACTERS, *OBJECTS])
def test_every_sprite_has_its_longer_side_and_a_shape(name: str) -> None:
    sprite = scenes.sprite_image(name, 50)
    alpha = np.asarray(sprite.getchannel("A"))
    assert max(sprite.size) == 50
    assert 0.2 < (alpha > 128).mean() < 1


def test_a_larger_picture_is_the_same_one_with_more_detail() -> None:
    for place in PLACES:
        for time in TIMES:
            scene = replace(scenes.scene_at(1, seed=4), place=place, time=time)
            small, large = scenes.draw_scene(scene), scenes.draw_scene(scene, scale=2)
            assert large.shape == (256, 256, 3)
            reduced = np.asarray(Image.fromarray(large).reduce(2), int)
            assert np.abs(reduced - small).mean() < 3
            resampled = Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(resampled, int) - large).mean() > 0.5


def test_large_sprites_stand_where_the_small_ones_do() -> None:
    for name in scenes.SPRITES:
        small, large = scenes.sprite_image(name, 50), scenes.sprite_image(name, 50, scale=2)
        assert large.size == (2 * small.width, 2 * small.height)
        opaque, reduced = (np.asarray(one.getchannel("A"), int) for one in (small, large.reduce(2)))
        assert np.abs(opaque - reduced).mean() < 12
