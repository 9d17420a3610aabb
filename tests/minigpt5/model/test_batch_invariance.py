"""The bits of a picture do not depend on the pictures that share its UNet calls."""

import pytest
import torch
from torch import nn

from minigpt5.config import default_model_folder
from minigpt5.model.batch_invariance import TILE_ROWS, EvenLinear, EvenRows, Pointwise, mend_denoiser
from minigpt5.model.folder import load_decoder_model


class Counting(nn.Module):
    """Notes how many rows it gets, and doubles them."""

    def __init__(self) -> None:
        super().__init__()
        self.nums: list[int] = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.nums.append(len(input))
        return 2 * input


@pytest.mark.parametrize(("num_rows", "expected"), [(1, 4), (4, 4), (5, 8)])
def test_rows_are_filled_up_and_only_the_asked_ones_come_back(num_rows: int, expected: int) -> None:
    layer = Counting()
    rows = torch.arange(float(num_rows * 3)).view(num_rows, 3)
    assert torch.equal(EvenRows(layer, 4)(rows), 2 * rows)
    assert layer.nums == [expected]


@pytest.mark.parametrize(("columns", "expected"), [(64, 2), (65, 1)])
def test_a_large_picture_is_not_decoded_twice(columns: int, expected: int) -> None:
    layer = Counting()
    latents = torch.arange(64.0 * columns).view(1, 1, 64, columns)
    assert torch.equal(EvenRows(layer, 2)(latents), 2 * latents)
    assert layer.nums == [expected]


@torch.no_grad()
def test_a_convolution_of_one_pixel_is_a_linear_layer() -> None:
    layer = nn.Conv2d(6, 4, 1)
    pixels = torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = layer(pixels)
    mend_denoiser(layers := nn.Sequential(layer))
    assert type(layers[0]) is Pointwise
    torch.testing.assert_close(layers(pixels), expected)


@torch.no_grad()
def test_no_layer_of_the_decoder_sees_how_few_pictures_are_drawn() -> None:
    _, _, diffusion = load_decoder_model(default_model_folder())
    unet, painters = diffusion.denoiser, (diffusion.vae, diffusion.upscaling)
    noise = torch.Generator().manual_seed(0)
    steps_BT = torch.randn(TILE_ROWS, unet.config.block_out_channels[0], generator=noise)
    latents_BCYX = torch.randn(2, unet.config.in_channels, 16, 16, generator=noise)
    for num in (1, 2, 6, 7):
        assert torch.equal(unet.time_embedding(steps_BT[:num]), unet.time_embedding(steps_BT)[:num]), num
    before = torch.get_num_threads()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        try:
            pairs = [[vae.decode(some).sample for some in (latents_BCYX[:1], latents_BCYX)] for vae in painters]
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(alone, together[:1]) for alone, together in pairs), num_threads
    with_few_rows = [name for name, layer in unet.named_modules() if name.endswith("time_emb_proj")]
    assert with_few_rows
    assert all(isinstance(unet.get_submodule(name), EvenLinear) for name in with_few_rows)
    assert any(isinstance(layer, Pointwise) for layer in unet.modules())
    assert not [layer for layer in unet.modules() if type(layer) is nn.Conv2d and layer.kernel_size == (1, 1)]
