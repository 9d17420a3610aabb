"""How alike two pictures of one story are, by the cosine of their features. More is not always better: the same picture
on all pages has 1. Compare systems at the same distance of pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from minigpt5.evaluation.alignment import Clip
from minigpt5.evaluation.frechet import extract
from minigpt5.evaluation.text import check_pairs


def clip_consistency(ones: Sequence[np.ndarray], others: Sequence[np.ndarray], clip: Clip) -> np.ndarray:
    """The cosine of each picture with the other one, by CLIP: (B,)."""
    check_pairs(ones, others)
    return (clip.embed_pictures(ones) * clip.embed_pictures(others)).sum(-1).double().cpu().numpy()


def efficientnet_consistency(
    ones: Sequence[np.ndarray], others: Sequence[np.ndarray], network: nn.Module
) -> np.ndarray:
    """The same by EfficientNet-Lite0's features (frechet.EfficientNetFeatures): (B,). Not comparable with CLIP's."""
    check_pairs(ones, others)
    first_BD, second_BD = extract(ones, network), extract(others, network)
    return nn.functional.cosine_similarity(first_BD.double(), second_BD.double()).numpy()
