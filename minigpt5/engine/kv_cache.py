"""Keys and values with a length per slot, so that sequences of any lengths share one forward pass.

The tokens of a pass lie one after another in a single sequence: linear layers see them all at once, and each slot's
tokens attend to that slot's own past. transformers' models are unchanged: the cache is a `Cache`, and the attention
is registered under `ATTENTION`, which without a pass is transformers' "sdpa".

Shape letters: L layers, R slots, G key heads, A query heads, S positions of a slot, T tokens of a pass, D head width.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "minigpt5_slots"
WASTE = 2
"""Slots attend in one call while it looks at no more than so many times the slots and positions that it needs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """Tokens of one slot that attend by themselves."""

    slot: int
    start: int
    """First token of the pass."""
    end: int
    length: int
    """Length of the slot, these tokens included."""
    mask_TS: Tensor | None
    """None: nothing is hidden that causality does not hide by itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Together:
    """Slots with one token each, which attend in one call over a range of the cache."""

    first: int
    last: int
    """Slots of the range; those between that are not here attend to no purpose."""
    slots: Tensor
    """Counted from `first`."""
    tokens: Tensor
    length: int
    """Length of the longest."""
    mask_R11S: Tensor
    """Added to the scores: 0, or minus infinity where a slot has no such position."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """Which slot and position each token of a forward pass belongs to."""

    slots_T: Tensor
    positions_1T: Tensor
    spans: list[Span]
    together: Together | None


def bytes_per_token(config: Any, bytes_per_value: int) -> int:
    """Keys and values of one token in every layer of a language model."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_width(config) * bytes_per_value


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class SlotCache(Cache):
    """Keys and values of at most `num_slots` sequences of at most `num_positions` tokens.

    Memory is bounded from the start and taken from the system only as positions are filled.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        head_width: int,
        num_slots: int,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(layers=[])
        shape = (num_layers, num_slots, num_heads, num_positions, head_width)
        self.num_slots, self.num_positions = num_slots, num_positions
        self.keys_LRGSD, self.values_LRGSD = (reserve(shape, dtype, torch.device(device)) for _ in range(2))
        self.lengths = [0] * num_slots
        self._pass: Pass | None = None

    @classmethod
    def for_model(cls, body: Any, *, num_slots: int, num_positions: int) -> SlotCache:
        """A cache for a transformer, with or without an adapter, whose attention is set to read it."""
        config = body.config
        window = getattr(config, "sliding_window", None)
        if window is not None and window < num_positions:
            raise ValueError(
                f"the base model sees {window} tokens back (sliding_window) but the context is {num_positions}: "
                "set context_tokens of config.json to at most that"
            )
        model = body.get_base_model() if isinstance(body, PeftModel) else body
        model.set_attn_implementation(ATTENTION)
        return cls(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_key_value_heads,
            head_width=head_width(config),
            num_slots=num_slots,
            num_positions=num_positions,
            dtype=next(body.parameters()).dtype,
            device=next(body.parameters()).device,
        )

    def forward(
        self,
        body: nn.Module,
        embeds_TH: Tensor,
        counts: Sequence[tuple[int, int]],
        *,
        positions_3T: Tensor | None = None,
    ) -> Tensor:
        """Append tokens to slots and return their last hidden states: (T, H).

        `counts`: (slot, number of its tokens), in the order of the tokens. `positions_3T`: what the model reads as
        their positions, where that is not their place in the slot.
        """
        self._pass = self._plan(counts)
        positions = self._pass.positions_1T if positions_3T is None else positions_3T[:, None]
        try:
            states_1TH = body(
                inputs_embeds=embeds_TH[None],
                position_ids=positions.to(embeds_TH.device),
                past_key_values=self,
                use_cache=True,
                slots=self._pass,
            ).last_hidden_state
        finally:
            self._pass = None
        for slot, num_tokens in counts:
            self.lengths[slot] += num_tokens
        return states_1TH[0]

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` begin as `source` does; it then has `length` positions."""
        for stored in (self.keys_LRGSD, self.values_LRGSD):
            stored[:, target, :, :length] = stored[:, source, :, :length]
        self.lengths[target] = length

    def _plan(self, counts: Sequence[tuple[int, int]]) -> Pass:
        slots: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for slot, num_tokens in counts:
            start, past = len(slots), self.lengths[slot]
            slots += [slot] * num_tokens
            positions += range(past, past + num_tokens)
            mask_TS = None
            if num_tokens > 1 and past:
                mask_TS = torch.ones(num_tokens, past + num_tokens, dtype=torch.bool).tril(past)
            spans.append(Span(slot=slot, start=start, end=len(slots), length=past + num_tokens, mask_TS=mask_TS))
        single = [span for span in spans if span.end - span.start == 1]
        longest = WASTE * sorted(span.length for span in single)[len(single) // 2] if single else 0
        joined = [span for span in single if span.length <= longest]
        num_slots = max((span.slot for span in joined), default=0) - min((span.slot for span in joined), default=0) + 1
        if len(joined) < 2 or num_slots > WASTE * len(joined):
            joined = []
        return Pass(
            slots_T=torch.tensor(slots),
            positions_1T=torch.tensor([positions]),
            spans=[span for span in spans if span not in joined],
            together=_join(joined) if joined else None,
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store a pass's keys and values (1, G, T, D); the layer's whole store is what its attention reads."""
        assert self._pass is not None, "a SlotCache is read and written by SlotCache.forward"
        where = (self._pass.slots_T, slice(None), self._pass.positions_1T[0])
        self.keys_LRGSD[layer_idx][where] = key_states[0].transpose(0, 1)
        self.values_LRGSD[layer_idx][where] = value_states[0].transpose(0, 1)
        return self.keys_LRGSD[layer_idx], self.values_LRGSD[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots have a length each, so positions are always given and no mask is made outside."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros (what is masked must be finite), which on the CPU take memory page by page as they are written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux: else the first token of a slot takes its memory to the last position
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _join(spans: list[Span]) -> Together:
    first, last = min(span.slot for span in spans), max(span.slot for span in spans)
    length = max(span.length for span in spans)
    slots = torch.tensor([span.slot - first for span in spans])
    seen_R = torch.ones(last - first + 1, dtype=torch.long)  # who is not here sees one position: to see none is NaN
    seen_R[slots] = torch.tensor([span.length for span in spans])
    hidden_RS = torch.arange(length) >= seen_R[:, None]
    return Together(
        first=first,
        last=last,
        slots=slots,
        tokens=torch.tensor([span.start for span in spans]),
        length=length,
        mask_R11S=torch.zeros(len(seen_R), 1, 1, length).masked_fill(hidden_RS[:, None, None], -torch.inf),
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slots: Pass | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of a pass: query (1, A, T, D) over key and value (R, G, S, D) -> (1, T, A, D)."""
    if slots is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    _, num_heads, num_tokens, width = query.shape
    out_TAD = query.new_empty(num_tokens, num_heads, width)
    for span in slots.spans:
        where = (slice(span.slot, span.slot + 1), slice(None), slice(span.length))
        mask = None if span.mask_TS is None else span.mask_TS[None, None].to(query.device)
        states = query[:, :, span.start : span.end]
        out_TAD[span.start : span.end] = sdpa_attention_forward(
            module, states, key[where], value[where], mask, **options
        )[0][0]
    if slots.together:
        part = slots.together
        query_RA1D = query.new_zeros(len(part.mask_R11S), num_heads, 1, width)
        query_RA1D[part.slots, :, 0] = query[0, :, part.tokens].transpose(0, 1)
        where = (slice(part.first, part.last + 1), slice(None), slice(part.length))
        mask = part.mask_R11S.to(query)
        out_R1AD = sdpa_attention_forward(module, query_RA1D, key[where], value[where], mask, **options)[0]
        out_TAD[part.tokens] = out_R1AD[part.slots, 0]
    return out_TAD[None], None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
