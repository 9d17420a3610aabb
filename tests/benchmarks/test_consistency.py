"""The figures of consistency: pages are compared by their distance, each way by itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.consistency import Told, compare, sheet
from benchmarks.quality_tables import consistency


def test_pages_that_are_one_picture_are_alike_at_every_distance(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stories = []
    for index in range(2):
        folder = tmp_path / str(index)
        folder.mkdir()
        texts = ["A fox found a balloon in the snow.", "It was night.", "A fox came to the beach."]
        (folder / "story.json").write_text(json.dumps({"prompt": "A fox who finds a balloon", "texts": texts}))
        same = rng.integers(256, size=(128, 128, 3), dtype=np.uint8)
        for page in (1, 2, 3):
            other = rng.integers(256, size=(128, 128, 3), dtype=np.uint8) // (page + index)
            for way, pixels in (("off", other), ("story", same)):
                Image.fromarray(pixels).save(folder / f"{way}-{page}.png")
        stories.append(Told.load(folder, index))
    figures = compare(stories)
    for distance, num in (("1", 4), ("2", 2)):
        one, other = (figures[way]["distances"][distance]["likeness"] for way in ("story", "off"))
        assert one["num"] == other["num"] == num
        assert one["mean"] > 0.999 > other["mean"]
    assert figures["off"]["pages"]["who"]["num"] == 4, "the pages after the first"
    assert sheet(stories).size == (3 * 128, 4 * 128)
    assert "likeness by EfficientNet, distance 2" in consistency({"consistency": figures})
