"""Keys and values with a length per slot, so that sequences of any lengths share one forward pass.

The tokens of a pass lie one after another in a single sequence. Linear layers see them all at once, and each slot's
tokens attend to that slot's own past (`slot_attention.py`). transformers' models are unchanged. The cache is a `Cache`.

Two things decide what a token sees:

- Positions: `SlotCache._plan` counts them within a slot. They place keys in the cache, and the body gets them as
  `position_ids`.
- Masks: transformers' own mask functions make one for each kind of layer (causal, sliding window, chunks), since the
  cache tells them each token's position in its slot (`get_query_offset`). `Pass.views` cuts it into slots.

Every layer keeps every position, those with a sliding window too: a prompt that begins as another, and a text that is
cut short, continue from any position.

Memory comes in one of two ways. On a CPU each slot has room for all its positions, which the system maps as they are
filled. Elsewhere slots share blocks of positions (`kv_blocks.py`), and attention gathers those of a slot.

Every slot begins with the language model's prefix, where it has one. Lengths and numbers of positions are without it.

Shape letters: R slots, G key heads, A query heads, S positions of a slot, T tokens of a pass, D head width, P places of
a store in blocks, N slots of a pass, B blocks of a slot, L layers, F tokens of the prefix.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from minigpt5.engine.kv_blocks import Blocks, num_blocks
from minigpt5.engine.kv_pass import PASS, Pass, Span, Where, current_pass, join, upload
from minigpt5.engine.slot_attention import ATTENTION
from minigpt5.limits import BLOCK
from minigpt5.model.language import body_inputs

WASTE = 2
"""Slots attend in one call while it looks at no more than so many times the slots and positions that it needs."""


class SlotCache(Cache):
    """Keys and values of at most `num_slots` sequences of at most `num_positions` tokens.

    Memory is bounded from the start. Whole slots take it from the system only as positions are filled.
    """

    def __init__(
        self, *, num_slots: int, num_positions: int, blocks: Blocks | None = None, prefix_L2GFD: Tensor | None = None
    ) -> None:
        """`blocks`: which slots share; None: each slot has room for all its positions."""
        super().__init__(layers=[])
        self.num_slots, self.num_positions, self.blocks = num_slots, num_positions, blocks
        self._prefix_L2GFD = prefix_L2GFD
        self._num_before = 0 if prefix_L2GFD is None else prefix_L2GFD.shape[3]
        self.stored_keys: list[Tensor] = []
        """Layer by layer, in the type of the first key that a layer gives: (R, G, S, D), or (1, G, P, D) in blocks."""
        self.stored_values: list[Tensor] = []
        self.lengths = [0] * num_slots

    @classmethod
    @torch.no_grad()
    def for_model(
        cls,
        body: Any,
        *,
        num_slots: int,
        num_positions: int,
        num_shared_blocks: int | None = None,
        prefix_L2GFD: Tensor | None = None,
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
        cache = cls(num_slots=num_slots, num_positions=num_positions, blocks=blocks, prefix_L2GFD=prefix_L2GFD)
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
        return num_blocks(self._num_before + num_positions) + kept <= self.blocks.num_available(idle)

    def take(self, slot: int, num_positions: int, *, idle: Iterable[int]) -> None:
        """Reserve positions for an idle slot, which keeps what it has read of so many; other idle slots forget theirs,
        one after another, as far as their blocks are needed."""
        self.lengths[slot] = min(self.lengths[slot], num_positions)
        if self.blocks:
            num_positions += self._num_before
            for other in idle:
                if self.blocks.num_available([slot]) >= num_blocks(num_positions):
                    break
                self.lengths[other] = 0
                self.trim(other)
            self.blocks.resize(slot, num_positions)
        if self._prefix_L2GFD is not None:
            where = self._places(slot, 0)
            for stored, of_layers in zip(
                (self.stored_keys, self.stored_values), self._prefix_L2GFD.unbind(1), strict=True
            ):
                for store, states_GFD in zip(stored, of_layers, strict=False):  # no stores yet: `for_model` reads first
                    store[where] = states_GFD.to(store)

    def trim(self, slot: int) -> None:
        """Give back what a slot has reserved beyond its length."""
        if self.blocks:
            length = self.lengths[slot]
            self.blocks.resize(slot, self._num_before + length if length else 0)

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
        if last_seen_T is not None:
            last_seen_T = last_seen_T + self._num_before
        planned = self._plan(counts, last_seen_T, embeds_TH.device)
        positions = planned.positions_1T if positions_3T is None else positions_3T[:, None] + self._num_before
        token = PASS.set(planned)
        try:
            states_1TH = body(
                **body_inputs(body, embeds_TH[None]),
                position_ids=upload(positions, embeds_TH.device),
                past_key_values=self,
                use_cache=True,
            ).last_hidden_state
        finally:
            PASS.reset(token)
        for slot, num_tokens in counts:
            self.lengths[slot] += num_tokens
        return states_1TH[0]

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` begin as `source` does; it then has `length` positions, and none where this fails."""
        self.lengths[target] = 0
        begins = [self._places(slot, length) for slot in (source, target)]
        for store in (*self.stored_keys, *self.stored_values):
            store[begins[1]] = store[begins[0]]
        self.lengths[target] = length

    def _places(self, slot: int, length: int) -> tuple[Any, ...]:
        """Index of a slot's prefix and of so many positions after it."""
        num_places = self._num_before + length
        if self.blocks is None:
            return slot, slice(None), slice(num_places)
        device = self.stored_keys[0].device if self.stored_keys else torch.device("cpu")
        return 0, slice(None), upload(self.blocks.places([slot])[0, :num_places], device)

    def _plan(self, counts: Sequence[tuple[int, int]], last_seen_T: Tensor | None, device: torch.device) -> Pass:
        slots: list[int] = []
        numbers: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for number, (slot, num_tokens) in enumerate(counts):
            start, past = len(slots), self._num_before + self.lengths[slot]
            slots += [slot] * num_tokens
            numbers += [number] * num_tokens
            positions += range(past, past + num_tokens)
            spans.append(Span(slot=slot, number=number, start=start, end=len(slots), length=past + num_tokens))
        single = [span for span in spans if span.end - span.start == 1]
        longest = WASTE * sorted(span.length for span in single)[len(single) // 2] if single else 0
        joined = [span for span in single if span.length <= longest]
        together = join(joined, device, is_gathered=self.blocks is not None) if len(joined) > 1 else None
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
            slot_positions=self._num_before + self.num_positions,
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
            shape = self.num_slots, num_heads, self._num_before + self.num_positions, width
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


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros (what is masked must be finite), which on the CPU take memory page by page as they are written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux: else the first token of a slot takes its memory to the last position
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
