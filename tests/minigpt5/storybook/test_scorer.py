"""The scorer reads true and blurred scenes and refuses other sprites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from minigpt5.errors import ModelFolderError
from minigpt5.storybook.captions import Facts
from minigpt5.storybook.scenes import CHARACTERS, OBJECTS, PLACES, TIMES, Scene, draw_scene, scene_at
from minigpt5.storybook.scorer import Scorer, default_scorer_folder, load_scorer

NUM = 150
FACTS = ("who", "what", "side", "place", "time")
SCENES = [scene_at(index, seed=21, split="heldout", held_out_pairs=None) for index in range(NUM)]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return load_scorer()


def blurred(pixels: np.ndarray, radius: float = 1.5) -> np.ndarray:
    return np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def share_right(scorer: Scorer, scenes: list[Scene], pixels: list[np.ndarray], name: str) -> float:
    answers = scorer.score(np.stack(pixels))
    return float(np.mean([getattr(a, name) == getattr(s, name) for a, s in zip(answers, scenes, strict=True)]))


@pytest.mark.parametrize("change", [np.array, blurred], ids=["true", "blurred"])
def test_it_reads_every_fact(scorer: Scorer, change: Callable[[np.ndarray], np.ndarray]) -> None:
    pictures = [change(draw_scene(scene)) for scene in SCENES]
    for name in FACTS:
        assert share_right(scorer, SCENES, pictures, name) >= 0.96, name


@pytest.mark.parametrize(("name", "names"), [("who", CHARACTERS), ("what", OBJECTS)])
@pytest.mark.parametrize("change", [np.array, blurred], ids=["true", "blurred"])
def test_it_says_no_to_a_swapped_sprite(
    scorer: Scorer, name: str, names: list[str], change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """The picture shows the next name in the list; what is asked for is not there."""
    others = [replace(s, **{name: names[(names.index(getattr(s, name)) + 1) % len(names)]}) for s in SCENES]
    accepted = share_right(scorer, SCENES, [change(draw_scene(other)) for other in others], name)
    assert accepted <= 0.02


def test_it_says_no_to_swapped_places_times_and_sides(scorer: Scorer) -> None:
    for name, values in (("place", PLACES), ("time", TIMES), ("side", ("left", "right"))):
        others = [replace(s, **{name: values[(values.index(getattr(s, name)) + 1) % len(values)]}) for s in SCENES]
        assert share_right(scorer, SCENES, [draw_scene(other) for other in others], name) <= 0.02, name


def test_it_names_nobody_in_an_empty_picture(scorer: Scorer) -> None:
    sky = np.linspace((110, 185, 240), (190, 225, 250), 76)
    ground = np.tile(np.array([112, 178, 76]), (52, 1))
    empty = np.repeat(np.concatenate([sky, ground])[:, None], 128, axis=1).astype(np.uint8)
    answer = scorer.score(empty[None])[0]
    assert answer == Facts(place="meadow", time="day")


def test_its_answers_do_not_depend_on_the_batch(scorer: Scorer) -> None:
    pixels = np.stack([draw_scene(scene) for scene in SCENES[:5]])
    assert scorer.score(pixels, batch_size=2) == [scorer.score(picture[None])[0] for picture in pixels]


def test_each_name_has_a_logit_for_each_side_and_one_stands_for_nothing() -> None:
    who, what, place, time = Scorer()(torch.zeros(2, 3, 128, 128))
    assert who.shape == (2, 2 * len(CHARACTERS) + 1) and what.shape == (2, 2 * len(OBJECTS) + 1)
    assert place.shape == (2, len(PLACES)) and time.shape == (2, len(TIMES))


def test_the_shipped_file_is_small() -> None:
    assert (default_scorer_folder() / "scorer.safetensors").stat().st_size < 4_000_000


def test_a_missing_scorer_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="python -m training.scorer"):
        load_scorer(tmp_path)
