"""The attention of a pass and its masks, registered with transformers under `ATTENTION`.

Each slot's tokens attend to that slot's own past. Without a pass, masks are those of transformers' "sdpa".

Shape letters: R slots, G key heads, A query heads, S positions of a slot, T tokens of a pass, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from minigpt5.engine.even_attention import attend_evenly
from minigpt5.engine.kv_pass import PASS, Pass, View

ATTENTION = "minigpt5_slots"
HONOURED = {"dropout", "scaling", "softcap", "s_aux"}
"""What models ask of their attention, and `attend` does."""
UNEVEN = {"softcap", "s_aux"}
"""What even attention does not do."""
NOT_NEEDED = {"sliding_window", "position_ids", "use_cache", "cache_position"}
"""What the masks do already, or what other attentions read."""


def make_mask(*, q_offset: int | Pass = 0, device: Any = "cpu", **options: Any) -> Tensor | None:
    """transformers' mask for "sdpa". In a pass it is always made, on the CPU, where `Pass.views` looks into it."""
    if isinstance(q_offset, Pass):
        positions_T = q_offset.positions_1T[0]
        offsets_T = positions_T - torch.arange(len(positions_T))
        options |= {"q_offset": offsets_T, "device": "cpu", "allow_is_causal_skip": False}
        mask_11TS = sdpa_mask(**options)
        if q_offset.last_seen_T is not None:
            places_S = torch.arange(mask_11TS.shape[-1])
            mask_11TS |= (places_S > positions_T[:, None]) & (places_S <= q_offset.last_seen_T[:, None])
        return mask_11TS
    return sdpa_mask(q_offset=q_offset, device=device, **options)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of a pass: query (1, A, T, D) over a layer's stores of keys and values -> (1, T, A, D).

    Raises ValueError where the model asks for something that is not honoured here.
    """
    asked = {name for name, option in options.items() if option is not None} - HONOURED - NOT_NEEDED
    if asked:
        raise ValueError(f"its attention needs {', '.join(sorted(asked))}")
    options = {name: options[name] for name in HONOURED & options.keys() if options[name] is not None}
    slots = PASS.get()
    if slots is None:
        return _attend(module, query, key, value, attention_mask, **options), None
    _, num_heads, num_tokens, width = query.shape
    if attention_mask is None or attention_mask.shape[2:] != (num_tokens, slots.num_positions):
        raise ValueError("its attention has masks that transformers' mask functions do not make")
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and not options.keys() & UNEVEN:
        calls = slots.calls(attention_mask)
        whole = slots.whole(key, calls), slots.whole(value, calls)
        return attend_evenly(query, *whole, calls, scaling=options.get("scaling")), None
    views, view_together = slots.views(attention_mask, query)
    out_TAD = query.new_empty(num_tokens, num_heads, value.shape[-1])
    for span, view in zip(slots.spans, views, strict=True):
        past = _past(key, view), _past(value, view)
        states = query[:, :, span.start : span.end]
        out_TAD[span.start : span.end] = _attend(module, states, *past, view.mask, **options)[0]
    if slots.together and view_together:
        part = slots.together
        query_RA1D = query.new_zeros(part.num_rows, num_heads, 1, width)
        query_RA1D[part.rows_there, :, 0] = query[0, :, part.tokens_there].transpose(0, 1)
        past = _past(key, view_together), _past(value, view_together)
        out_R1AD = _attend(module, query_RA1D, *past, view_together.mask, **options)
        out_TAD[part.tokens_there] = out_R1AD[part.rows_there, 0]
    return out_TAD[None], None


def _past(store: Tensor, view: View) -> Tensor:
    """The keys or values that a view sees, (R, G, S, D): a part of whole slots' store, or gathered from blocks."""
    return store[0, :, view.where].transpose(0, 1) if isinstance(view.where, Tensor) else store[view.where]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention (R, A, T, D) over (R, G, S, D) -> (R, T, A, D), as "sdpa" has it, or "eager" where that cannot.

    `softcap`: scores are capped softly (arXiv 2408.00118, 2). `s_aux`: a score for each head that takes its share of
    the softmax and adds nothing to the sum (attention sinks, arXiv 2508.10925).
    """
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]
    num_groups, num_tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = repeat_kv(key, num_groups), repeat_kv(value, num_groups)
    scores_RATS = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores_RATS = softcap * torch.tanh(scores_RATS / softcap)
    if mask is None and num_tokens > 1:
        mask = torch.ones(num_tokens, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores_RATS = scores_RATS.masked_fill(~mask, torch.finfo(scores_RATS.dtype).min)
    elif mask is not None:
        scores_RATS = scores_RATS + mask
    if s_aux is not None:
        sinks_RAT1 = s_aux.to(scores_RATS).view(1, -1, 1, 1).expand(*scores_RATS.shape[:3], 1)
        scores_RATS = torch.cat([scores_RATS, sinks_RAT1], dim=-1)
    shares_RATS = torch.softmax(scores_RATS, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    shares_RATS = nn.functional.dropout(shares_RATS, dropout, training=module.training)
    return (shares_RATS @ value).transpose(1, 2)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, make_mask)
