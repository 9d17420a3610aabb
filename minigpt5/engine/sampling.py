"""(seed, page, position, logits) -> token: a pure function, so that a story does not depend on its batch.

On a CPU `draw_token` chooses one token, and says how firmly. Where logits lie on a GPU, `draw_tokens` chooses those of
all rows there, by the same numbers and order of tokens: only ids travel.

Shape letters: R rows, T vocabulary, K (row, token) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minigpt5.engine.kv_pass import upload
from minigpt5.types import Sampling

NOT_DRAWN = -1
"""What `draw_tokens` gives for a row whose logits are not finite."""
NOT_FINITE = "the model's logits are not finite: use another precision, or another model"
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


@dataclass(frozen=True, kw_only=True)
class TokenDraw:
    """What decides a token besides its logits."""

    sampling: Sampling
    seed: int
    page: int
    position: int
    seen: list[int]
    """Words so far, which the repetition penalty lowers."""
    closed: list[int]
    """Tokens that may not follow."""
    is_rushed: bool = False
    """Whether the first voken gets ten times the best logit, the published way to force a picture (D11)."""


def draw_token(logits_T: np.ndarray, draw: TokenDraw, *, first_voken: int) -> Choice:
    """Choose a token on the CPU."""
    if draw.is_rushed:
        logits_T = logits_T.copy()
        logits_T[first_voken] = 10 * logits_T.max()
    return sample_token(
        mask(logits_T, draw.closed, first_voken=first_voken),
        draw.sampling,
        seed=draw.seed,
        page=draw.page,
        position=draw.position,
        seen=draw.seen,
    )


def mask(logits_T: np.ndarray, closed: list[int], *, first_voken: int) -> np.ndarray:
    """Logits of what may follow: text, or the first voken; the other vokens come after it by themselves."""
    logits_T = logits_T.copy()
    logits_T[first_voken + 1 :] = -np.inf
    logits_T[closed] = -np.inf
    return logits_T


@torch.no_grad()
def draw_tokens(logits_RT: Tensor, draws: Sequence[TokenDraw], *, first_voken: int) -> list[int]:
    """Choose the tokens of all rows on the device of their logits, as `draw_token` does.

    A row's choice depends on its own logits and draw alone, and is NOT_DRAWN where `draw_token` raises
    FloatingPointError. The host waits once, for the ids.
    """
    logits_RT = logits_RT.to(torch.float32, copy=True)
    device = logits_RT.device
    if rushed := [row for row, draw in enumerate(draws) if draw.is_rushed]:
        rushed_R = upload(torch.tensor(rushed), device)
        logits_RT[rushed_R, first_voken] = 10 * logits_RT[rushed_R].amax(dim=1)
    logits_RT[:, first_voken + 1 :] = -torch.inf
    if closed := [(row, token) for row, draw in enumerate(draws) for token in draw.closed]:
        rows_K, tokens_K = upload(torch.tensor(closed).T, device)
        logits_RT[rows_K, tokens_K] = -torch.inf
    _lower_seen(logits_RT, draws)
    numbers = [
        (draw.sampling.temperature, draw.sampling.top_p, uniform(draw.seed, draw.page, draw.position)) for draw in draws
    ]
    temperature_R1, top_p_R1, uniform_R1 = upload(torch.tensor(numbers, dtype=torch.float64).T[..., None], device)
    sorted_RT, order_RT = logits_RT.sort(dim=1, descending=True, stable=True)
    is_greedy_R1 = temperature_R1 == 0
    scaled_RT = (sorted_RT.double() - sorted_RT[:, :1]) / temperature_R1.masked_fill(is_greedy_R1, 1)
    cumulative_RT = scaled_RT.softmax(dim=1).cumsum(dim=1)
    last_R1 = (cumulative_RT < top_p_R1).sum(dim=1, keepdim=True).clamp(max=logits_RT.shape[1] - 1)
    draw_R1 = uniform_R1 * cumulative_RT.gather(1, last_R1)
    place_R1 = (cumulative_RT <= draw_R1).sum(dim=1, keepdim=True).minimum(last_R1)
    ids_R1 = order_RT.gather(1, place_R1.masked_fill(is_greedy_R1, 0))
    ids: list[int] = ids_R1.masked_fill(~sorted_RT[:, :1].isfinite(), NOT_DRAWN)[:, 0].tolist()
    return ids


def _lower_seen(logits_RT: Tensor, draws: Sequence[TokenDraw]) -> None:
    """Apply the repetition penalty in place."""
    seen = [
        (row, token, draw.sampling.repetition_penalty)
        for row, draw in enumerate(draws)
        if draw.sampling.repetition_penalty != 1
        for token in set(draw.seen)
    ]
    if not seen:
        return
    rows, tokens, penalties = zip(*seen, strict=True)
    rows_K, tokens_K = upload(torch.tensor([rows, tokens]), logits_RT.device)
    penalty_K = upload(torch.tensor(penalties), logits_RT.device)
    values_K = logits_RT[rows_K, tokens_K]
    logits_RT[rows_K, tokens_K] = torch.where(values_K > 0, values_K / penalty_K, values_K * penalty_K)


def uniform(seed: int, page: int, position: int) -> float:
    """The number in [0, 1) that draws a token: a hash of its key, without a state."""
    return float(np.random.default_rng([seed, page, position]).random())


def sample_token(
    logits_T: np.ndarray, sampling: Sampling, *, seed: int, page: int, position: int, seen: list[int]
) -> Choice:
    """Choose a token. `seen`: words so far, which the repetition penalty lowers. Raises FloatingPointError where the
    model's logits are not finite."""
    if not np.isfinite(logits_T.max()):
        raise FloatingPointError(NOT_FINITE)
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
    draw = uniform(seed, page, position) * kept[-1]
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
