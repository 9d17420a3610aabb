"""The sheets for the eye: as many pictures as they say, of the scenes and phrasings that they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import sheets
from benchmarks.phrasings import SEED
from minigpt5.config import default_model_folder
from minigpt5.pipeline import MiniGPT5
from minigpt5.storybook.captions import Facts
from minigpt5.storybook.phrasings import phrase
from minigpt5.storybook.scenes import scene_at


def test_a_sheet_has_a_cell_for_each_picture() -> None:
    rows = [[np.full((8, 8, 3), 40 * row + 10 * column, np.uint8) for column in range(3)] for row in range(2)]
    found = np.asarray(sheets.sheet(rows, 8))
    assert found.shape == (2 * 10 - 2, 3 * 10 - 2, 3)
    assert [int(found[y, x, 0]) for y in (0, 10) for x in (0, 10, 20)] == [0, 10, 20, 40, 50, 60]
    assert (found[:, 8:10] == 255).all()


def test_a_row_is_one_scene_in_seen_and_unseen_phrasings() -> None:
    texts = sheets.texts_of(0, 12)
    assert len(set(texts)) == 12 and texts == sheets.texts_of(0, 12)
    facts = Facts.of(scene_at(0, seed=SEED, split="heldout", held_out_pairs=True))
    for column, kind in ((0, "seen"), (5, "seen"), (6, "unseen"), (11, "unseen")):
        assert texts[column] == phrase(facts, np.random.default_rng([SEED, 0, column]), kind)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_shipped_model_fills_them(tmp_path: Path) -> None:
    model = MiniGPT5.from_pretrained(default_model_folder())
    sheets.save_phrasings(model, tmp_path / "phrasings.webp", num_scenes=1, num=2)
    sheets.save_outside(model, tmp_path / "outside.webp")
    assert Image.open(tmp_path / "phrasings.webp").size == (2 * sheets.CELL_PX + 2, sheets.CELL_PX)
    side_px = model.config.drawn_px
    assert Image.open(tmp_path / "outside.webp").size == (2 * side_px + 2, side_px)
