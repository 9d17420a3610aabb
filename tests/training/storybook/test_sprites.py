"""Sprites in pictures: which pixels they are, where they are found, how much an error counts on them."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image, ImageFilter

from minigpt5.storybook.captions import Facts, facts_in
from minigpt5.storybook.crispness import crispness
from minigpt5.storybook.scenes import CHARACTERS, Scene, draw_scene, scene_at
from training.data.batches import batch_at
from training.storybook.examples import StorybookExamples, WeightedScene, example_at
from training.storybook.presets import STORYBOOK
from training.storybook.sprites import SPRITE_WEIGHT, Sprite, cleared, error_weight, find_sprites, redrawn, sprites_of

SCENES = [scene_at(index, seed=1) for index in range(4)]


def blurred(scene: Scene) -> np.ndarray:
    return np.array(Image.fromarray(draw_scene(scene)).filter(ImageFilter.GaussianBlur(1.5)))


def test_an_error_counts_more_where_a_sprite_has_little_contrast() -> None:
    weights = {}
    for name in ("elephant", "panda"):
        sprite = Sprite(name=name, side_px=50, left=10, top=40)
        weight_YX = error_weight([sprite], around=2.0)[0]
        assert weight_YX[0, 0] == 1 and weight_YX.shape == (128, 128)
        assert (weight_YX[sprite.window] == 2).any()
        (weights[name],) = set(weight_YX[sprite.mask()].tolist())
    assert weights["elephant"] > 2 * SPRITE_WEIGHT > 4 * weights["panda"] > 2


def test_sprites_are_found_in_a_blurred_picture_where_they_stand() -> None:
    for scene in SCENES:
        for found, true in zip(find_sprites(blurred(scene), scene), sprites_of(scene), strict=True):
            assert found.name == true.name
            assert max(abs(found.left - true.left), abs(found.top - true.top)) <= 2
            assert abs(found.side_px - true.side_px) <= 2


def test_a_sprite_that_a_picture_does_not_show_is_not_found() -> None:
    """The picture has another character in its place, or the two have changed places."""
    for scene in SCENES:
        following = CHARACTERS[(CHARACTERS.index(scene.who) + 1) % len(CHARACTERS)]
        names = {sprite.name for sprite in find_sprites(draw_scene(scene), dataclasses.replace(scene, who=following))}
        assert names == {scene.what}
        turned = dataclasses.replace(scene, side="left" if scene.side == "right" else "right")
        assert find_sprites(draw_scene(scene), turned) == []


def test_what_was_drawn_softly_is_drawn_anew_and_nothing_else_is_touched() -> None:
    for scene in SCENES:
        soft = blurred(scene)
        sprites = find_sprites(soft, scene)
        target = redrawn(soft, sprites)
        assert crispness(target, scene.who) > crispness(soft, scene.who) + 0.03
        beside_YX = np.ones(soft.shape[:2], bool)
        for sprite in sprites:
            beside_YX[sprite.window] = False
        assert np.array_equal(target[beside_YX], soft[beside_YX]) and beside_YX.mean() > 0.4


def test_what_is_behind_sprites_is_told_from_what_is_beside_them() -> None:
    """A halo around a sprite goes with it; where there is nothing beside, everything stays."""
    ramp_YX3 = np.repeat(np.arange(128, dtype=np.uint8)[:, None, None], 128, axis=1).repeat(3, axis=2)
    sprite = Sprite(name="fox", side_px=50, left=12, top=50)
    drawn = redrawn(ramp_YX3, [sprite])
    drawn[np.array(Image.fromarray(sprite.mask()).convert("L").filter(ImageFilter.MaxFilter(15))) > 0] = 255
    assert np.array_equal(cleared(drawn, [sprite]), ramp_YX3)
    trees = drawn.copy()
    trees[70:80, 84:128] = trees[70:80, 84:128] // 4
    assert np.array_equal(cleared(trees, [sprite])[70:80], trees[70:80]), "what is beside it is of two colours"
    assert np.array_equal(cleared(trees, [sprite])[80:], ramp_YX3[80:])
    wide = [dataclasses.replace(sprite, name="house", left=left, side_px=60) for left in (0, 66)]
    rows = np.flatnonzero(np.any([one.mask() for one in wide], axis=0).sum(1) > 110)
    assert len(rows) and np.array_equal(cleared(drawn, wide)[rows], drawn[rows])


def test_a_sprite_before_another_takes_none_of_its_weight() -> None:
    elephant = Sprite(name="elephant", side_px=50, left=40, top=40)
    weight_1YX = error_weight([elephant, Sprite(name="fox", side_px=50, left=70, top=40)], around=SPRITE_WEIGHT)
    alone_1YX = error_weight([elephant], around=SPRITE_WEIGHT)
    fox_YX = Sprite(name="fox", side_px=50, left=70, top=40).mask()
    mask_YX = elephant.mask() & ~fox_YX
    assert np.array_equal(weight_1YX[0][mask_YX], alone_1YX[0][mask_YX])


def test_examples_to_sharpen_say_every_fact_and_where_the_sprites_are() -> None:
    preset = STORYBOOK["sharpen"]
    example = example_at(preset, 3)
    assert isinstance(example, WeightedScene)
    said, facts = facts_in(example.caption), Facts.of(example.scene)
    assert (said.who, said.what, said.place, said.time) == (facts.who, facts.what, facts.place, facts.time)
    assert example.masks.shape == (2, 128, 128) and example.masks.any((1, 2)).all()
    batch = batch_at(StorybookExamples(preset), 0, 3)
    assert np.shape([one.masks for one in batch.examples]) == (3, 2, 128, 128)
    assert np.shape([one.weight for one in batch.examples]) == (3, 1, 128, 128)
