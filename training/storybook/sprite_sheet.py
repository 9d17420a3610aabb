"""Draw the sheet of large sprites from their vectors: `python -m training.storybook.sprite_sheet ICONS OUT`.

    npm pack @iconify-json/noto@1.2.9 && tar xzf iconify-json-noto-1.2.9.tgz
    python -m training.storybook.sprite_sheet package/icons.json minigpt5/storybook/sprites-large.webp

ICONS is the package's `icons.json`; `rsvg-convert` (librsvg) draws them.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt5.storybook.scenes import LARGE_TILE_PX, SPRITES, TILES_PER_ROW

MARGIN_PX = 2
VIEW = 128
"""Width and height of an icon's coordinates where it names none."""


def draw_sprite(icons: dict[str, Any], name: str) -> Image.Image:
    """An icon with transparency, cut to its visible part, its longer side as a tile has room for."""
    rough = _rasterise(icons, name, LARGE_TILE_PX)
    left, top, right, bottom = rough.getchannel("A").getbbox() or (0, 0, *rough.size)
    room = LARGE_TILE_PX - 2 * MARGIN_PX
    whole = _rasterise(icons, name, room * LARGE_TILE_PX // max(right - left, bottom - top))
    sprite = whole.crop(whole.getchannel("A").getbbox())
    sprite.thumbnail((room, room), Image.Resampling.LANCZOS)  # by a pixel, where rounding made it larger
    return sprite


def _rasterise(icons: dict[str, Any], name: str, side_px: int) -> Image.Image:
    icon = icons["icons"][name]
    width, height = (icon.get(axis, icons.get(axis, VIEW)) for axis in ("width", "height"))
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    command = ["rsvg-convert", "--width", str(side_px), "--height", str(side_px)]
    png = subprocess.run(command, input=drawing.encode(), capture_output=True, check=True).stdout
    return Image.open(io.BytesIO(png)).convert("RGBA")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.storybook.sprite_sheet", description=__doc__)
    parser.add_argument("icons", type=Path, help="icons.json of @iconify-json/noto")
    parser.add_argument("out", type=Path, help="the sheet, lossless WebP")
    options = parser.parse_args(arguments)
    icons = json.loads(options.icons.read_text())
    num_rows = -(-len(SPRITES) // TILES_PER_ROW)
    sheet = Image.new("RGBA", (TILES_PER_ROW * LARGE_TILE_PX, num_rows * LARGE_TILE_PX))
    for index, name in enumerate(SPRITES):
        row, column = divmod(index, TILES_PER_ROW)
        sheet.paste(draw_sprite(icons, name), (column * LARGE_TILE_PX + MARGIN_PX, row * LARGE_TILE_PX + MARGIN_PX))
    sheet.save(options.out, "WEBP", lossless=True, quality=100, method=6)


if __name__ == "__main__":
    main()
