"""(seed, page, position, logits) -> token: a pure function, so that a story does not depend on its batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minigpt5.types import Sampling

LIKELY = 12.0
"""Tokens whose scaled logit is so far below the best one's are first left out of sorting."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A token, and how firmly it was chosen."""

    token: int
    margin: float
    """How little would have changed the choice. Greedy: the best logit's lead. Sampled: the smallest of the draw's
    and of top_p's distance to a border between probabilities, and of the token's relative lead over its neighbours
    in the order of probabilities."""


def sample_token(
    logits_T: np.ndarray, sampling: Sampling, *, seed: int, page: int, position: int, seen: list[int]
) -> Choice:
    """Choose a token. `seen`: words so far, which the repetition penalty lowers."""
    if sampling.repetition_penalty != 1 and seen:
        logits_T = logits_T.astype(np.float64)
        ids = np.unique(seen)
        values = logits_T[ids]
        logits_T[ids] = np.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = int(logits_T.argmax())
        others = logits_T[:token], logits_T[token + 1 :]
        second = max(other.max(initial=-np.inf) for other in others)
        return Choice(token=token, margin=float(logits_T[token] - second))
    scaled = (logits_T.astype(np.float64) - logits_T.max()) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    order, cumulative = _sort(probabilities, np.flatnonzero(scaled > -LIKELY))
    if cumulative[-1] <= sampling.top_p:
        order, cumulative = _sort(probabilities, np.arange(len(probabilities)))
    kept = cumulative[: int(np.searchsorted(cumulative, sampling.top_p)) + 1]
    draw = np.random.default_rng([seed, page, position]).random() * kept[-1]
    place = min(int(np.searchsorted(kept, draw, side="right")), len(kept) - 1)
    margin = min([abs(draw - border) for border in kept[:-1][max(place - 1, 0) : place + 1]], default=1.0)
    if margin < probabilities[order[len(kept) - 1]]:  # else one token more or less to draw from changes nothing
        margin = min([margin, *np.abs(kept[-2:] - sampling.top_p)])
    neighbours = [order[at] for at in (place - 1, place + 1) if 0 <= at < len(order)]
    leads = [abs(probabilities[other] / probabilities[order[place]] - 1) for other in neighbours]
    return Choice(token=int(order[place]), margin=float(min([margin, *leads])))


def _sort(probabilities: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens from the likeliest, and the sums of their probabilities."""
    order = tokens[np.argsort(-probabilities[tokens], kind="stable")]
    return order, np.cumsum(probabilities[order])
