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

Memory comes in one of two ways. On a CPU each slot has room for all its positions, which the system maps as they are
filled. Elsewhere slots share `Blocks` of positions (arXiv 2309.06180), and attention gathers those of a slot.

Shape letters: R slots, G key heads, A query heads, S positions of a slot, T tokens of a pass, D head width, P places of
a store in blocks, N slots of a pass, B blocks of a slot.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from minigpt5.engine.even_attention import BLOCK as EVEN_BLOCK
from minigpt5.engine.even_attention import Call, attend_evenly, plan_calls
from minigpt5.limits import BLOCK
from minigpt5.model.language import body_inputs

ATTENTION = "minigpt5_slots"
WASTE = 2
"""Slots attend in one call while it looks at no more than so many times the slots and positions that it needs."""
HONOURED = {"dropout", "scaling", "softcap", "s_aux"}
"""What models ask of their attention, and `attend` does."""
UNEVEN = {"softcap", "s_aux"}
"""What even attention does not do."""
NOT_NEEDED = {"sliding_window", "position_ids", "use_cache", "cache_position"}
"""What the masks do already, or what other attentions read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """Tokens of one slot that attend by themselves."""

    slot: int
    number: int
    """Of the slots of the pass."""
    start: int
    """First token of the pass."""
    end: int
    length: int
    """Length of the slot, these tokens included."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Together:
    """Slots with one token each, which attend in one call: over a range of whole slots, or over gathered blocks."""

    slots: slice
    """Their range, where slots are whole. Those between that are not here attend to no purpose."""
    numbers_there: Tensor
    """Of the slots of the pass, on the device of the states, as are the next two."""
    rows_there: Tensor
    tokens_there: Tensor
    num_rows: int
    """Slots of the call."""
    rows: Tensor
    """Which of them are here."""
    tokens: Tensor
    length: int
    """Length of the longest."""


Where = Tensor | tuple[Tensor | slice | int, ...]
"""Index of a store: places of a store in blocks; or slots, heads and positions of whole slots."""


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """Which positions the tokens of a span, or the slots of `Together`, see."""

    where: Where
    """Keys and values of the positions that any of them sees."""
    mask: Tensor | None
    """Of a span (1, 1, T, S): whether a token sees a position; None where causality alone decides it. Of slots together
    (R, 1, 1, S): added to the scores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """Which slot and position each token of a forward pass belongs to."""

    rows_T: Tensor
    """The slot of each token, or where slots share blocks, its number among those of the pass."""
    positions_1T: Tensor
    where: Where
    """Where its keys and values are stored."""
    places_NS: Tensor | None
    """Places of its slots' positions; None: slots are whole. What is no position has any place."""
    spans: list[Span]
    together: Together | None
    num_positions: int
    """Length of the longest slot."""
    slot_positions: int
    """Most that a slot may have."""
    last_seen_T: Tensor | None
    """The last position of its slot that each token sees; None: its own."""
    _views: dict[int, tuple[Tensor, list[View], View | None]] = field(default_factory=dict)
    _calls: dict[int, tuple[Tensor, list[Call]]] = field(default_factory=dict)

    def calls(self, mask_11TS: Tensor) -> list[Call]:
        """The calls of even attention by a mask, which layers with the same mask share."""
        if id(mask_11TS) not in self._calls:  # the mask is kept with them, so that its id stays its own
            self._calls[id(mask_11TS)] = (
                mask_11TS,
                plan_calls(self.rows_T.tolist(), mask_11TS[0, 0], self.slot_positions),
            )
        return self._calls[id(mask_11TS)][1]

    def whole(self, store: Tensor, calls: list[Call]) -> Tensor:
        """A layer's store as even attention reads it, (R, G, S, D): blocks are gathered as far as the calls see."""
        if self.places_NS is None:
            return store
        return store[0, :, self.places_NS[:, : max(call.positions.stop for call in calls)]].transpose(0, 1)

    def views(self, mask_11TS: Tensor, like: Tensor) -> tuple[list[View], View | None]:
        """What each span and `together` see by a mask of (token, position of its slot), on the device and with the
        type of `like`. Layers with the same mask share the answer."""
        if id(mask_11TS) not in self._views:  # the mask is kept with them, so that its id stays its own
            mask_TS = mask_11TS[0, 0]
            spans = [self._view(span, mask_TS, like) for span in self.spans]
            together = self._view_together(self.together, mask_TS, like) if self.together else None
            self._views[id(mask_11TS)] = (mask_11TS, spans, together)
        return self._views[id(mask_11TS)][1:]

    def _view(self, span: Span, mask_TS: Tensor, like: Tensor) -> View:
        mask_TS = mask_TS[span.start : span.end, : span.length]
        first = int(mask_TS.any(dim=0).int().argmax())
        mask_TS = mask_TS[:, first:]
        num_tokens, num_seen = mask_TS.shape
        is_causal = num_tokens in (1, num_seen) and torch.equal(
            mask_TS, torch.ones_like(mask_TS).tril(num_seen - num_tokens)
        )
        seen = slice(first, span.length)
        return View(
            where=self._where(slice(span.slot, span.slot + 1), slice(span.number, span.number + 1), seen),
            mask=None if is_causal else upload(mask_TS[None, None], like.device),
        )

    def _view_together(self, part: Together, mask_TS: Tensor, like: Tensor) -> View:
        hidden_RS = torch.zeros(part.num_rows, part.length)  # slots that are not here see all (to see none is NaN)
        hidden_RS[part.rows] = hidden_RS[part.rows].masked_fill(~mask_TS[part.tokens, : part.length], -torch.inf)
        first = int(mask_TS[part.tokens].any(dim=0).int().argmax())
        seen = slice(first, part.length)
        return View(
            where=self._where(part.slots, part.numbers_there, seen),
            mask=upload(hidden_RS[:, None, None, first:].to(like.dtype), like.device),
        )

    def _where(self, slots: slice, numbers: Tensor | slice, seen: slice) -> Where:
        """Index of some positions: of a range of whole slots, or of the slots of the pass with these numbers."""
        return (slots, slice(None), seen) if self.places_NS is None else self.places_NS[numbers, seen]


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A GPU takes it while the host goes on."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


_PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)
"""The pass that this thread's `SlotCache.forward` is in. Not every model hands arguments on to its attention."""


def current_pass() -> Pass:
    found = _PASS.get()
    assert found, "a SlotCache is read and written by SlotCache.forward"
    return found


def bytes_per_token(body: Any, bytes_per_value: int | None = None) -> int:
    """Size of the keys and values of one token in every layer of a transformer, which reads a token to show them; at
    another width of a value than its own, where that is given."""
    theirs = DynamicCache()
    with torch.no_grad():
        body(inputs_embeds=_first_embedding(body), past_key_values=theirs, use_cache=True)
    stored = [states for layer in theirs.layers for states in (layer.keys, layer.values)]
    return sum(states.numel() * (bytes_per_value or states.element_size()) for states in stored)


def _first_embedding(body: Any) -> Tensor:
    embedding: nn.Module = body.get_input_embeddings()
    return embedding(torch.zeros(1, 1, dtype=torch.long, device=next(embedding.parameters()).device))


class Blocks:
    """Blocks of a store, and which of them each slot has, in the order of its positions.

    The store has one block more, of zeros, which stands where a slot has none: what is masked must be finite."""

    def __init__(self, *, num_slots: int, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._of_slots: list[list[int]] = [[] for _ in range(num_slots)]

    def num_available(self, idle: Iterable[int]) -> int:
        """Blocks that are free, or that idle slots have."""
        return len(self._free) + sum(len(self._of_slots[slot]) for slot in idle)

    def resize(self, slot: int, num_positions: int) -> None:
        """Give a slot blocks for so many positions, and take back what it has beyond them."""
        owned, needed = self._of_slots[slot], num_blocks(num_positions)
        assert needed - len(owned) <= len(self._free), "blocks are reserved before they are taken"
        while len(owned) < needed:
            owned.append(self._free.pop())
        while len(owned) > needed:
            self._free.append(owned.pop())

    def places(self, slots: Sequence[int]) -> Tensor:
        """The places of the slots' positions, as many as the longest has, and then of zeros; in all a multiple of what
        even attention takes at once."""
        step = EVEN_BLOCK // BLOCK
        longest = -(-max(len(self._of_slots[slot]) for slot in slots) // step) * step
        zeros = self.num_blocks
        table_NB = torch.tensor(
            [self._of_slots[slot] + [zeros] * (longest - len(self._of_slots[slot])) for slot in slots]
        )
        return (table_NB[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)


def num_blocks(num_positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-num_positions // BLOCK)


class SlotCache(Cache):
    """Keys and values of at most `num_slots` sequences of at most `num_positions` tokens.

    Memory is bounded from the start. Whole slots take it from the system only as positions are filled.
    """

    def __init__(self, *, num_slots: int, num_positions: int, blocks: Blocks | None = None) -> None:
        """`blocks`: which slots share; None: each slot has room for all its positions."""
        super().__init__(layers=[])
        self.num_slots, self.num_positions, self.blocks = num_slots, num_positions, blocks
        self.stored_keys: list[Tensor] = []
        """Layer by layer, in the type of the first key that a layer gives: (R, G, S, D), or (1, G, P, D) in blocks."""
        self.stored_values: list[Tensor] = []
        self.lengths = [0] * num_slots

    @classmethod
    @torch.no_grad()
    def for_model(
        cls, body: Any, *, num_slots: int, num_positions: int, num_shared_blocks: int | None = None
    ) -> SlotCache:
        """A cache for a transformer, with or without an adapter, whose attention is set to read it.

        The transformer reads one token, which shows the sizes of every layer. `num_shared_blocks`: the store's size,
        where slots share it. Raises ValueError where its attention asks for what `attend` does not do.
        """
        model = body.get_base_model() if isinstance(body, PeftModel) else body
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            raise ValueError(f"a {model.config.model_type} does not attend through transformers' attention interface")
        blocks = Blocks(num_slots=num_slots, num_blocks=num_shared_blocks) if num_shared_blocks else None
        cache = cls(num_slots=num_slots, num_positions=num_positions, blocks=blocks)
        cache.take(0, 1, idle=[])
        cache.forward(body, _first_embedding(body)[0], [(0, 1)])
        cache.lengths[0] = 0
        cache.trim(0)
        if not cache.stored_keys:
            raise ValueError("none of its layers keeps keys and values")
        return cache

    def has_room(self, num_positions: int, *, idle: Iterable[int], share: float = 1.0) -> bool:
        """Whether a slot can have so many positions once idle slots have given up theirs, and leave `1 - share` of the
        store to others."""
        if self.blocks is None:
            return True
        kept = int(self.blocks.num_blocks * (1 - share))
        return num_blocks(num_positions) + kept <= self.blocks.num_available(idle)

    def take(self, slot: int, num_positions: int, *, idle: Iterable[int]) -> None:
        """Reserve positions for an idle slot, which keeps what it has read of so many; other idle slots forget theirs,
        one after another, as far as their blocks are needed."""
        self.lengths[slot] = min(self.lengths[slot], num_positions)
        if self.blocks is None:
            return
        for other in idle:
            if self.blocks.num_available([slot]) >= num_blocks(num_positions):
                break
            self.lengths[other] = 0
            self.trim(other)
        self.blocks.resize(slot, num_positions)

    def trim(self, slot: int) -> None:
        """Give back what a slot has reserved beyond its length."""
        if self.blocks:
            self.blocks.resize(slot, self.lengths[slot])

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
        planned = self._plan(counts, last_seen_T, embeds_TH.device)
        positions = planned.positions_1T if positions_3T is None else positions_3T[:, None]
        token = _PASS.set(planned)
        try:
            states_1TH = body(
                **body_inputs(body, embeds_TH[None]),
                position_ids=upload(positions, embeds_TH.device),
                past_key_values=self,
                use_cache=True,
            ).last_hidden_state
        finally:
            _PASS.reset(token)
        for slot, num_tokens in counts:
            self.lengths[slot] += num_tokens
        return states_1TH[0]

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` begin as `source` does; it then has `length` positions, and none where this fails."""
        self.lengths[target] = 0
        stores = [*self.stored_keys, *self.stored_values]
        begins: list[tuple[Any, ...]] = [(slot, slice(None), slice(length)) for slot in (source, target)]
        if self.blocks:
            places_NS = upload(self.blocks.places([source, target])[:, :length], stores[0].device)
            begins = [(0, slice(None), places_S) for places_S in places_NS]
        for store in stores:
            store[begins[1]] = store[begins[0]]
        self.lengths[target] = length

    def _plan(self, counts: Sequence[tuple[int, int]], last_seen_T: Tensor | None, device: torch.device) -> Pass:
        slots: list[int] = []
        numbers: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for number, (slot, num_tokens) in enumerate(counts):
            start, past = len(slots), self.lengths[slot]
            slots += [slot] * num_tokens
            numbers += [number] * num_tokens
            positions += range(past, past + num_tokens)
            spans.append(Span(slot=slot, number=number, start=start, end=len(slots), length=past + num_tokens))
        single = [span for span in spans if span.end - span.start == 1]
        longest = WASTE * sorted(span.length for span in single)[len(single) // 2] if single else 0
        joined = [span for span in single if span.length <= longest]
        together = _join(joined, device, is_gathered=self.blocks is not None) if len(joined) > 1 else None
        if together is None or together.num_rows > WASTE * len(joined):
            together, joined = None, []
        slots_T, positions_T = torch.tensor(slots), torch.tensor(positions)
        places_NS = None
        if self.blocks is None and len(spans) == 1:  # an index of slices is quicker
            where: Where = (slots[0], slice(None), slice(positions[0], positions[-1] + 1))
        elif self.blocks is None:
            where = (upload(slots_T, device), slice(None), upload(positions_T, device))
        else:
            places_NS = self.blocks.places([slot for slot, _ in counts])
            where, places_NS = upload(places_NS[numbers, positions_T], device), upload(places_NS, device)
        return Pass(
            rows_T=slots_T if self.blocks is None else torch.tensor(numbers),
            positions_1T=positions_T[None],
            where=where,
            places_NS=places_NS,
            spans=[span for span in spans if span not in joined],
            together=together,
            num_positions=max(span.length for span in spans),
            slot_positions=self.num_positions,
            last_seen_T=last_seen_T,
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store a pass's keys and values (1, G, T, D); the layer's whole store is what its attention reads."""
        where = current_pass().where
        if layer_idx == len(self.stored_keys):
            for stored, new in ((self.stored_keys, key_states), (self.stored_values, value_states)):
                stored.append(self._new_store(new))
        keys, values = self.stored_keys[layer_idx], self.stored_values[layer_idx]
        for store, new in ((keys, key_states), (values, value_states)):
            if isinstance(where, Tensor):
                store[0, :, where] = new[0]
            elif isinstance(where[0], int):
                store[where] = new[0]
            else:
                store[where] = new[0].transpose(0, 1)
        return keys, values

    def _new_store(self, like_1GTD: Tensor) -> Tensor:
        """A layer's store of keys or of values."""
        _, num_heads, _, width = like_1GTD.shape
        if self.blocks is None:
            shape = self.num_slots, num_heads, self.num_positions, width
            return reserve(shape, like_1GTD.dtype, like_1GTD.device)
        # What is gathered of a place lies together.
        shape_PGD = (self.blocks.num_blocks + 1) * BLOCK, num_heads, width
        return reserve(shape_PGD, like_1GTD.dtype, like_1GTD.device).transpose(0, 1)[None]

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


def _join(spans: list[Span], device: torch.device, *, is_gathered: bool) -> Together:
    first, last = min(span.slot for span in spans), max(span.slot for span in spans)
    rows = torch.arange(len(spans)) if is_gathered else torch.tensor([span.slot - first for span in spans])
    tokens = torch.tensor([span.start for span in spans])
    return Together(
        slots=slice(first, last + 1),
        numbers_there=upload(torch.tensor([span.number for span in spans]), device),
        rows_there=upload(rows, device),
        tokens_there=upload(tokens, device),
        num_rows=len(spans) if is_gathered else last - first + 1,
        rows=rows,
        tokens=tokens,
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
    """Attention of a pass: query (1, A, T, D) over a layer's stores of keys and values -> (1, T, A, D).

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
