"""The picture world's own accuracies: do pictures show the facts that were asked for? The scorer reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minigpt5.evaluation.text import check_pairs
from minigpt5.storybook.captions import FACTS, Facts
from minigpt5.storybook.scorer import Scorer


def facts_shown(pixels: np.ndarray, asked: Sequence[Facts], scorer: Scorer) -> dict[str, np.ndarray]:
    """Whether each picture (B, 128, 128, 3) uint8 shows each fact as it was asked for, and all of them: (B,) bool
    each."""
    check_pairs(pixels, asked)
    pairs = list(zip(scorer.score(pixels), asked, strict=True))
    right = {name: [vars(answer)[name] == vars(facts)[name] for answer, facts in pairs] for name in FACTS}
    right["all"] = [answer == facts for answer, facts in pairs]
    return {name: np.array(values) for name, values in right.items()}


def fact_accuracy(pixels: np.ndarray, asked: Sequence[Facts], scorer: Scorer) -> dict[str, float]:
    """The share of pictures that show each fact, and all of them."""
    return {name: float(values.mean()) for name, values in facts_shown(pixels, asked, scorer).items()}
