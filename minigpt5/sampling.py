"""(seed, page, position, logits) -> token: a pure function, so that a story does not depend on its company."""

from __future__ import annotations

import numpy as np

from minigpt5.types import Sampling


def sample_token(
    logits_T: np.ndarray, sampling: Sampling, *, seed: int, page: int, position: int, seen: list[int]
) -> int:
    """Choose a token. `seen`: tokens of this page so far, which the repetition penalty lowers."""
    logits_T = logits_T.astype(np.float64)
    if sampling.repetition_penalty != 1 and seen:
        ids = np.unique(seen)
        values = logits_T[ids]
        logits_T[ids] = np.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits_T.argmax())
    scaled = (logits_T - logits_T.max()) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    cumulative = np.cumsum(probabilities[order])
    num_kept = int(np.searchsorted(cumulative, sampling.top_p)) + 1
    cumulative = cumulative[:num_kept]
    draw = np.random.default_rng([seed, page, position]).random() * cumulative[-1]
    return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), num_kept - 1)])
