"""Keys and values with a length per slot, so that sequences of any lengths share one forward pass.

The tokens of a pass lie one after another in a single sequence. Linear layers see them all at once, and each slot's
tokens attend to that slot's own past. transformers' models are unchanged. The cache is a `Cache`. The attention and
its masks are registered under `ATTENTION`, which without a pass masks as transformers' "sdpa" does.

Two things decide what a token sees:

- Positions: `SlotCache._plan` counts them within a slot. They place keys in the cache, and the body gets them as
  `position_ids`.
- Masks: transformers' own mask functions make one for each kind of layer (causal, sliding window, chunks), since the
  cache tells them each token's position in its slot (`get_query_offset`). `Pass.views` cuts it into slots.

Every layer keeps every position, those with a sliding window too: a prompt that begins as another, and a text that is
cut short, continue from any position.

Shape letters: R slots, G key heads, A query heads, S positions of a slot, T tokens of a pass, D head width.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from minigpt5.engine.even_attention import Call, attend_evenly, plan_calls
from minigpt5.model.language import body_inputs

ATTENTION = "minigpt5_slots"
WASTE = 2
"""Slots attend in one call while it looks at no more than so many times the slots and positions that it needs."""
HONOURED = {"dropout", "scaling", "softcap", "s_aux"}
"""What models ask of their attention, and `attend` does."""
NOT_NEEDED = {"sliding_window", "position_ids", "use_cache", "cache_position"}
"""What the masks do already, or what other attentions read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """Tokens of one slot that attend by themselves."""

    slot: int
    start: int
    """First token of the pass."""
    end: int
    length: int
    """Length of the slot, these tokens included."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Together:
    """Slots with one token each, which attend in one call over a range of the cache."""

    first: int
    num_slots: int
    """Slots of the range; those between that are not here attend to no purpose."""
    slots: Tensor
    """Counted from `first`."""
    tokens: Tensor
    length: int
    """Length of the longest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """Which positions the tokens of a span, or the slots of `Together`, see."""

    positions: slice
    """Positions that any of them sees."""
    mask: Tensor | None
    """Of a span (1, 1, T, S): whether a token sees a position; None where causality alone decides it. Of slots together
    (R, 1, 1, S): added to the scores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """Which slot and position each token of a forward pass belongs to."""

    slots_T: Tensor
    positions_1T: Tensor
    spans: list[Span]
    together: Together | None
    num_positions: int
    """Length of the longest slot."""
    last_seen_T: Tensor | None
    """The last position of its slot that each token sees; None: its own."""
    _views: dict[int, tuple[Tensor, list[View], View | None]] = field(default_factory=dict)
    _calls: dict[int, tuple[Tensor, list[Call]]] = field(default_factory=dict)

    def calls(self, mask_11TS: Tensor, num_positions: int) -> list[Call]:
        """The calls of even attention by a mask, which layers with the same mask share."""
        if id(mask_11TS) not in self._calls:  # the mask is kept with them, so that its id stays its own
            self._calls[id(mask_11TS)] = (
                mask_11TS,
                plan_calls(self.slots_T.tolist(), mask_11TS[0, 0], num_positions),
            )
        return self._calls[id(mask_11TS)][1]

    def views(self, mask_11TS: Tensor, like: Tensor) -> tuple[list[View], View | None]:
        """What each span and `together` see by a mask of (token, position of its slot), on the device and with the
        type of `like`. Layers with the same mask share the answer."""
        if id(mask_11TS) not in self._views:  # the mask is kept with them, so that its id stays its own
            mask_TS = mask_11TS[0, 0]
            spans = [_view(span, mask_TS, like) for span in self.spans]
            together = _view_together(self.together, mask_TS, like) if self.together else None
            self._views[id(mask_11TS)] = (mask_11TS, spans, together)
        return self._views[id(mask_11TS)][1:]


_PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)
"""The pass that this thread's `SlotCache.forward` is in. Not every model hands arguments on to its attention."""


def current_pass() -> Pass:
    found = _PASS.get()
    assert found, "a SlotCache is read and written by SlotCache.forward"
    return found


def _view(span: Span, mask_TS: Tensor, like: Tensor) -> View:
    mask_TS = mask_TS[span.start : span.end, : span.length]
    first = int(mask_TS.any(dim=0).int().argmax())
    mask_TS = mask_TS[:, first:]
    num_tokens, num_seen = mask_TS.shape
    is_causal = num_tokens in (1, num_seen) and torch.equal(
        mask_TS, torch.ones_like(mask_TS).tril(num_seen - num_tokens)
    )
    return View(positions=slice(first, span.length), mask=None if is_causal else mask_TS[None, None].to(like.device))


def _view_together(part: Together, mask_TS: Tensor, like: Tensor) -> View:
    hidden_RS = torch.zeros(part.num_slots, part.length)  # slots that are not here see all (to see none is NaN)
    hidden_RS[part.slots] = hidden_RS[part.slots].masked_fill(~mask_TS[part.tokens, : part.length], -torch.inf)
    first = int(mask_TS[part.tokens].any(dim=0).int().argmax())
    return View(positions=slice(first, part.length), mask=hidden_RS[:, None, None, first:].to(like))


def bytes_per_token(body: Any, bytes_per_value: int) -> int:
    """Keys and values of one token in every layer of a transformer, which reads a token to show them."""
    theirs = DynamicCache()
    with torch.no_grad():
        body(inputs_embeds=_first_embedding(body), past_key_values=theirs, use_cache=True)
    return sum(layer.keys.numel() + layer.values.numel() for layer in theirs.layers) * bytes_per_value


def _first_embedding(body: Any) -> Tensor:
    embedding: nn.Module = body.get_input_embeddings()
    return embedding(torch.zeros(1, 1, dtype=torch.long, device=next(embedding.parameters()).device))


class SlotCache(Cache):
    """Keys and values of at most `num_slots` sequences of at most `num_positions` tokens.

    Memory is bounded from the start and taken from the system only as positions are filled.
    """

    def __init__(self, *, num_slots: int, num_positions: int) -> None:
        super().__init__(layers=[])
        self.num_slots, self.num_positions = num_slots, num_positions
        self.keys_RGSD: list[Tensor] = []
        """Layer by layer, in the shape and type of the first key that a layer gives."""
        self.values_RGSD: list[Tensor] = []
        self.lengths = [0] * num_slots

    @classmethod
    @torch.no_grad()
    def for_model(cls, body: Any, *, num_slots: int, num_positions: int) -> SlotCache:
        """A cache for a transformer, with or without an adapter, whose attention is set to read it.

        The transformer reads one token, which shows the sizes of every layer. Raises ValueError where its attention
        asks for what `attend` does not do.
        """
        model = body.get_base_model() if isinstance(body, PeftModel) else body
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            raise ValueError(f"a {model.config.model_type} does not attend through transformers' attention interface")
        cache = cls(num_slots=num_slots, num_positions=num_positions)
        cache.forward(body, _first_embedding(body)[0], [(0, 1)])
        cache.lengths[0] = 0
        if not cache.keys_RGSD:
            raise ValueError("none of its layers keeps keys and values")
        return cache

    def forward(
        self,
        body: nn.Module,
        embeds_TH: Tensor,
        counts: Sequence[tuple[int, int]],
        *,
        positions_3T: Tensor | None = None,
        last_seen_T: Tensor | None = None,
    ) -> Tensor:
        """Append tokens to slots and return their last hidden states: (T, H).

        `counts`: (slot, number of its tokens), in the order of the tokens. `positions_3T`: what the model reads as
        their positions, where that is not their place in the slot. `last_seen_T`: the last place in its slot that each
        token sees, where that is not its own; it is among the tokens of this pass.
        """
        planned = self._plan(counts, last_seen_T)
        positions = planned.positions_1T if positions_3T is None else positions_3T[:, None]
        token = _PASS.set(planned)
        try:
            states_1TH = body(
                **body_inputs(body, embeds_TH[None]),
                position_ids=positions.to(embeds_TH.device),
                past_key_values=self,
                use_cache=True,
            ).last_hidden_state
        finally:
            _PASS.reset(token)
        for slot, num_tokens in counts:
            self.lengths[slot] += num_tokens
        return states_1TH[0]

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` begin as `source` does; it then has `length` positions."""
        for stored_RGSD in (*self.keys_RGSD, *self.values_RGSD):
            stored_RGSD[target, :, :length] = stored_RGSD[source, :, :length]
        self.lengths[target] = length

    def _plan(self, counts: Sequence[tuple[int, int]], last_seen_T: Tensor | None) -> Pass:
        slots: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for slot, num_tokens in counts:
            start, past = len(slots), self.lengths[slot]
            slots += [slot] * num_tokens
            positions += range(past, past + num_tokens)
            spans.append(Span(slot=slot, start=start, end=len(slots), length=past + num_tokens))
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
            num_positions=max(span.length for span in spans),
            last_seen_T=last_seen_T,
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store a pass's keys and values (1, G, T, D); the layer's whole store is what its attention reads."""
        planned = current_pass()
        if layer_idx == len(self.keys_RGSD):
            for stored, new in ((self.keys_RGSD, key_states), (self.values_RGSD, value_states)):
                shape = (self.num_slots, new.shape[1], self.num_positions, new.shape[3])
                stored.append(reserve(shape, new.dtype, new.device))
        if len(planned.spans) == 1 and not planned.together:  # the same, quicker
            span = planned.spans[0]
            places = slice(span.length - key_states.shape[2], span.length)
            self.keys_RGSD[layer_idx][span.slot, :, places] = key_states[0]
            self.values_RGSD[layer_idx][span.slot, :, places] = value_states[0]
            return self.keys_RGSD[layer_idx], self.values_RGSD[layer_idx]
        where = (planned.slots_T, slice(None), planned.positions_1T[0])
        self.keys_RGSD[layer_idx][where] = key_states[0].transpose(0, 1)
        self.values_RGSD[layer_idx][where] = value_states[0].transpose(0, 1)
        return self.keys_RGSD[layer_idx], self.values_RGSD[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots have a length each, so positions are always given."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> Pass:
        """The pass, in place of the number that transformers passes on to `make_mask`: tokens have an offset each."""
        return current_pass()

    def refuse_state(self, *args: object, **kwargs: object) -> Any:
        """Refuse layers of linear attention, convolution or recurrence, by what they ask a cache for first."""
        raise ValueError("some of its layers keep a state that is neither keys nor values")

    has_previous_state = get_conv_state = get_recurrent_state = update_conv_state = update_indexer = refuse_state

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Masks have a column for each position of the longest slot."""
        return current_pass().num_positions, 0


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
    return Together(
        first=first,
        num_slots=last - first + 1,
        slots=torch.tensor([span.slot - first for span in spans]),
        tokens=torch.tensor([span.start for span in spans]),
        length=max(span.length for span in spans),
    )


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
    """Attention of a pass: query (1, A, T, D) over key and value (R, G, S, D) -> (1, T, A, D).

    Raises ValueError where the model asks for something that is not honoured here.
    """
    asked = {name for name, option in options.items() if option is not None} - HONOURED - NOT_NEEDED
    if asked:
        raise ValueError(f"its attention needs {', '.join(sorted(asked))}")
    options = {name: options[name] for name in HONOURED & options.keys() if options[name] is not None}
    slots = _PASS.get()
    if slots is None:
        return _attend(module, query, key, value, attention_mask, **options), None
    _, num_heads, num_tokens, width = query.shape
    if attention_mask is None or attention_mask.shape[2:] != (num_tokens, slots.num_positions):
        raise ValueError("its attention has masks that transformers' mask functions do not make")
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and not options.keys() & {"softcap", "s_aux"}:
        calls = slots.calls(attention_mask, key.shape[2])
        return attend_evenly(query, key, value, calls, scaling=options.get("scaling")), None
    views, view_together = slots.views(attention_mask, query)
    out_TAD = query.new_empty(num_tokens, num_heads, value.shape[-1])
    for span, view in zip(slots.spans, views, strict=True):
        where = (slice(span.slot, span.slot + 1), slice(None), view.positions)
        states = query[:, :, span.start : span.end]
        out_TAD[span.start : span.end] = _attend(module, states, key[where], value[where], view.mask, **options)[0]
    if slots.together and view_together:
        part = slots.together
        query_RA1D = query.new_zeros(part.num_slots, num_heads, 1, width)
        query_RA1D[part.slots, :, 0] = query[0, :, part.tokens].transpose(0, 1)
        where = (slice(part.first, part.first + part.num_slots), slice(None), view_together.positions)
        out_R1AD = _attend(module, query_RA1D, key[where], value[where], view_together.mask, **options)
        out_TAD[part.tokens] = out_R1AD[part.slots, 0]
    return out_TAD[None], None


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
