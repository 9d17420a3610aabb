"""Attention whose rows have the same bits in any company, in bfloat16 on a CPU.

The kernel's order of additions depends on the number of queries and of keys in a call, and on nothing else. So each
token is an item of its own, with the query heads that share a key head as its queries. Its keys are filled up to a
multiple of BLOCK, and a call takes tokens with the same range of keys. It has one thread: a second one's last bits may
differ (2 of 37,000 tokens and layers of the shipped model).

Shape letters: R slots, G key heads, A query heads, W query heads of a key head, S positions of a slot, T tokens of a
pass, D head width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt5.engine.threads import single_thread

BLOCK = 64
"""Keys of a call are a multiple of it, or end where a slot ends."""
WASTE = 2
"""Slots attend in one call while it looks at no more than so many times those that it needs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """Tokens that attend in one call, each to the same range of positions of its slot."""

    tokens: Tensor
    """Where they are in the pass: (T,)."""
    items: Tensor | None
    """Their places among the slots of the call; None: all are of one slot."""
    first_slot: int
    num_slots: int
    positions: slice
    mask: Tensor
    """(T or slots, 1, 1, positions): added to the scores."""


def plan_calls(slots: Sequence[int], mask_TS: Tensor, num_positions: int) -> list[Call]:
    """Which calls a pass needs, by the slot of each token and the positions that it sees. `num_positions` of a slot."""
    steps_S = torch.arange(1, mask_TS.shape[1] + 1)
    ends = (mask_TS * steps_S).amax(dim=1).tolist()
    starts = mask_TS.int().argmax(dim=1).tolist()
    ranges: dict[tuple[int, int], list[int]] = defaultdict(list)
    for token, (start, end) in enumerate(zip(starts, ends, strict=True)):
        ranges[start // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, num_positions)].append(token)
    calls = []
    for (start, end), tokens in ranges.items():
        for group in _group_by_slot(tokens, slots):
            calls.append(_plan_call(group, slots, slice(start, end), mask_TS))
    return calls


def _group_by_slot(tokens: list[int], slots: Sequence[int]) -> list[list[int]]:
    """Tokens that attend in one call: those of one slot, or slots near each other with one token each."""
    by_slot: dict[int, list[int]] = defaultdict(list)
    for token in tokens:
        by_slot[slots[token]].append(token)
    single = [group[0] for _, group in sorted(by_slot.items()) if len(group) == 1]
    groups = [group for group in by_slot.values() if len(group) > 1]
    if len(single) > 1 and slots[single[-1]] - slots[single[0]] + 1 <= WASTE * len(single):
        return [*groups, single]
    return [*groups, *([token] for token in single)]


def _plan_call(tokens: list[int], slots: Sequence[int], positions: slice, mask_TS: Tensor) -> Call:
    first, last = slots[tokens[0]], slots[tokens[-1]]
    seen_TS = mask_TS[tokens, positions.start : positions.stop]
    seen_TS = F.pad(seen_TS, (0, positions.stop - positions.start - seen_TS.shape[1]))
    hidden_TS = torch.zeros(seen_TS.shape, dtype=torch.bfloat16).masked_fill_(~seen_TS, -torch.inf)
    items = None
    if first != last:
        items = torch.tensor([slots[token] - first for token in tokens])
        hidden_RS = hidden_TS.new_zeros(last - first + 1, hidden_TS.shape[1])  # slots between see all, to no purpose
        hidden_RS[items] = hidden_TS
        hidden_TS = hidden_RS
    return Call(
        tokens=torch.tensor(tokens),
        items=items,
        first_slot=first,
        num_slots=last - first + 1,
        positions=positions,
        mask=hidden_TS[:, None, None],
    )


def attend_evenly(
    query: Tensor, key_RGSD: Tensor, value_RGSD: Tensor, calls: Sequence[Call], *, scaling: float | None
) -> Tensor:
    """Query (1, A, T, D) over whole slots (R, G, S, D) -> (1, T, A, D)."""
    _, num_heads, num_tokens, _ = query.shape
    query_TGWD = query[0].transpose(0, 1).unflatten(1, (key_RGSD.shape[1], -1))
    if len(calls) == 1 and calls[0].items is None:
        return _call(query_TGWD, key_RGSD, value_RGSD, calls[0], scaling).flatten(1, 2)[None]
    out_TAD = query.new_empty(num_tokens, num_heads, value_RGSD.shape[-1])
    for call in calls:
        items = query_TGWD[call.tokens]
        if call.items is not None:
            items = items.new_zeros(call.num_slots, *items.shape[1:]).index_copy_(0, call.items, items)
        out = _call(items, key_RGSD, value_RGSD, call, scaling).flatten(1, 2)
        out_TAD[call.tokens] = out if call.items is None else out[call.items]
    return out_TAD[None]


def _call(items: Tensor, key_RGSD: Tensor, value_RGSD: Tensor, call: Call, scaling: float | None) -> Tensor:
    where = (slice(call.first_slot, call.first_slot + call.num_slots), slice(None), call.positions)
    key, value = key_RGSD[where], value_RGSD[where]
    if len(items) != len(key):
        key, value = key.expand(len(items), -1, -1, -1), value.expand(len(items), -1, -1, -1)
    with single_thread():
        return F.scaled_dot_product_attention(items, key, value, attn_mask=call.mask, scale=scaling)
