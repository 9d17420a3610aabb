"""The distance of features: nothing for the same picture, the more the softer one is."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageFilter

from minigpt5.model.pixels import to_tensor
from minigpt5.storybook.scenes import draw_scene, scene_at
from training.storybook.feature_loss import FeatureLoss


def test_it_grows_with_a_blur_and_reaches_the_picture_alone() -> None:
    loss, true = FeatureLoss().train(), [draw_scene(scene_at(index, seed=3), scale=2) for index in range(2)]
    soft = [
        np.stack([np.array(Image.fromarray(one).filter(ImageFilter.GaussianBlur(radius))) for one in true])
        for radius in (0, 1, 3)
    ]
    none, little, much = (float(loss(to_tensor(pictures), to_tensor(np.stack(true)))) for pictures in soft)
    assert none == 0 and 0.01 < little < 0.7 * much
    drawn_BCYX = to_tensor(soft[2]).requires_grad_()
    loss(drawn_BCYX, to_tensor(np.stack(true))).backward()
    assert drawn_BCYX.grad is not None and drawn_BCYX.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not any(module.training for module in loss.modules() if isinstance(module, torch.nn.BatchNorm2d))
