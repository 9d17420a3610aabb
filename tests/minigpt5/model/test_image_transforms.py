"""What is read is cut out of the middle, what is drawn is padded with white, as published."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt5.model.image_transforms import fit_drawn, fit_read
from tests.helpers.picture_files import encode, png_header
from tests.helpers.tiny import tiny_config, tiny_vision


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    return encode(Image.fromarray(pixels), "PNG")


@pytest.mark.parametrize("px", [96, 128])
def test_a_small_square_is_read_as_it_is(px: int) -> None:
    assert (fit_read(png(noise(px, px)), 224) == noise(px, px)).all()


@pytest.mark.parametrize("px", [96, 128])
def test_a_small_square_reaches_the_encoder_without_rounding(px: int) -> None:
    """The shipped model was trained on pictures that are enlarged in floating point."""
    vision = tiny_vision(tiny_config())
    pixels = noise(px, px)
    enlarged = torch.nn.functional.interpolate(
        torch.tensor(pixels).permute(2, 0, 1)[None].float(), (224, 224), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        expected = vision.qformer(vision.encoder((enlarged - 127) / 128))
        assert torch.equal(vision.read([png(pixels)]), expected)
        assert torch.equal(vision(pixels[None]), expected)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 1000), (512, 512), (225, 3000)])
def test_a_large_picture_is_read_as_published(width: int, height: int) -> None:
    """torchvision's Resize and CenterCrop on Pillow pictures: the short side to 224, the middle of the result."""
    picture = Image.fromarray(noise(width, height))
    size = tuple(round(side * 224 / min(width, height)) for side in (width, height))
    whole = picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in size)
    expected = np.asarray(whole.crop((left, top, left + 224, top + 224))).astype(int)
    assert np.abs(fit_read(png(noise(width, height)), 224) - expected).max() <= 1


def test_the_middle_of_a_small_picture_is_read() -> None:
    assert (fit_read(png(noise(100, 40)), 224) == noise(100, 40)[:, 30:70]).all()
    assert (fit_read(png(noise(40, 100)), 224) == noise(40, 100)[30:70]).all()


def test_what_is_drawn_is_padded_with_white() -> None:
    drawn = fit_drawn(png(np.zeros((20, 40, 3), np.uint8)), 40)
    assert (drawn[:10] == 255).all() and (drawn[10:30] == 0).all() and (drawn[30:] == 255).all()
    assert (fit_drawn(png(noise(40, 40)), 40) == noise(40, 40)).all()


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (1, 2_000_000)])
def test_a_long_line_takes_little_memory(size: tuple[int, int]) -> None:
    line = encode(Image.new("RGB", size, (0, 0, 255)), "PNG")
    assert (fit_read(line, 224) == [0, 0, 255]).all() and fit_read(line, 224).shape == (1, 1, 3)
    drawn = fit_drawn(line, 64)
    assert drawn.shape == (64, 64, 3) and (drawn[0, 0] == 255).all() and drawn.min() < 255


def test_pictures_of_several_sizes_are_read_together() -> None:
    vision = tiny_vision(tiny_config())
    files = [png(noise(100, 40)), png(noise(300, 300))]
    together = vision.read(files)
    alone = torch.cat([vision.read([file]) for file in files])
    assert together.shape == alone.shape and torch.allclose(together, alone, atol=1e-4)


def test_a_picture_that_is_none_is_refused() -> None:
    for fit in (fit_read, fit_drawn):
        with pytest.raises(ValueError, match="9000 x 9000 pixels"):
            fit(png_header(9000, 9000), 64)
