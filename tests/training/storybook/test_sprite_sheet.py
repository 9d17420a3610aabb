"""The sheet of large sprites, from vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt5.storybook.scenes import LARGE_TILE_PX, SPRITES
from training.storybook.sprite_sheet import MARGIN_PX, main


@pytest.mark.skipif(not shutil.which("rsvg-convert"), reason="there is no rsvg-convert (librsvg2-bin)")
def test_every_sprite_fills_its_tile_and_keeps_its_shape(tmp_path: Path) -> None:
    body = '<rect x="8" y="24" width="64" height="32" fill="#d02020"/>'
    icons = {"icons": {name: {"body": body} for name in SPRITES}, "width": 96, "height": 96}
    (tmp_path / "icons.json").write_text(json.dumps(icons))
    main([str(tmp_path / "icons.json"), str(tmp_path / "sheet.webp")])
    sheet = Image.open(tmp_path / "sheet.webp").convert("RGBA")
    assert sheet.size == (10 * LARGE_TILE_PX, 6 * LARGE_TILE_PX)
    for row, column in ((0, 0), (5, len(SPRITES) % 10 - 1)):
        x, y = column * LARGE_TILE_PX, row * LARGE_TILE_PX
        tile = sheet.crop((x, y, x + LARGE_TILE_PX, y + LARGE_TILE_PX))
        left, top, right, bottom = tile.getchannel("A").getbbox() or (0, 0, 0, 0)
        room = LARGE_TILE_PX - 2 * MARGIN_PX
        assert (left, top) == (MARGIN_PX, MARGIN_PX) and room - 1 <= right - left <= room
        assert abs((right - left) - 2 * (bottom - top)) <= 2
        assert tuple(np.asarray(tile)[MARGIN_PX + 10, MARGIN_PX + 10]) == (208, 32, 32, 255)
    assert not sheet.crop((x + LARGE_TILE_PX, y, 10 * LARGE_TILE_PX, y + LARGE_TILE_PX)).getchannel("A").getbbox()
