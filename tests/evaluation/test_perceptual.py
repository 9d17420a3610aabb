"""LPIPS and PSNR: the metric's own weights, what it finds near and far, and what its reader of pickles refuses."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from minigpt5.evaluation import perceptual
from minigpt5.evaluation.perceptual import Lpips, psnr_db
from minigpt5.model.pixels import to_tensor
from minigpt5.storybook.scenes import draw_scene, scene_at


def scenes(num: int) -> np.ndarray:
    return np.stack([draw_scene(scene_at(i, seed=3, split="validation")) for i in range(num)])


def blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(radius))) for one in pixels])


def test_the_more_a_picture_is_blurred_the_farther_it_is() -> None:
    true, lpips = scenes(4), Lpips()
    far_B = [lpips(to_tensor(true), to_tensor(blurred(true, radius))) for radius in (0.7, 1.5, 3.0)]
    assert (lpips(to_tensor(true), to_tensor(true)) == 0).all()
    assert all((nearer < farther).all() for nearer, farther in zip(far_B, far_B[1:], strict=False))
    another_B = lpips(to_tensor(true), to_tensor(true[::-1].copy()))
    assert (another_B > far_B[1]).all() and (another_B < 1.5).all()


def test_lpips_sees_a_blur_where_pixels_see_a_tint() -> None:
    """What it is for: a colour shift of the same squared error is the nearer one to the eye."""
    true = to_tensor(scenes(4))
    blur = to_tensor(blurred(scenes(4), 1.5))
    shift_B111 = (true - blur).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    assert psnr_db(true, true + shift_B111).numpy() == pytest.approx(psnr_db(true, blur).numpy(), abs=0.01)
    assert (Lpips()(true, true + shift_B111) < 0.5 * Lpips()(true, blur)).all()


def test_psnr_of_a_tenth_of_the_range_is_20_db() -> None:
    true = torch.zeros(2, 3, 8, 8)
    assert psnr_db(true, true + 0.2).tolist() == pytest.approx([20.0, 20.0])


def test_heads_count_nothing_against_a_difference() -> None:
    weights = Lpips().weights
    assert all((weights[f"head{index}"] >= 0).all() for index in range(5))
    assert weights["conv0.weight"].shape == (64, 3, 11, 11)


def test_a_pickle_of_anything_but_arrays_is_refused(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    written = pickle.dumps(arrays, protocol=3).replace(b"numpy._core", b"numpy.core")  # as older ones wrote them
    read = perceptual._ArraysUnpickler(io.BytesIO(written)).load()
    assert np.array_equal(read["a"], arrays["a"])
    with pytest.raises(pickle.UnpicklingError, match="is not what arrays are made of"):
        perceptual._ArraysUnpickler(io.BytesIO(pickle.dumps(tmp_path))).load()
