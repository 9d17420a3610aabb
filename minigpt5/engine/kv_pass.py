"""One forward pass over a KV store: the slot and position of each token, and what each sees.

Shape letters: R slots, S positions of a slot, T tokens of a pass, N slots of a pass.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minigpt5.engine.even_attention import Call, plan_calls


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


PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)
"""The pass that this thread's `SlotCache.forward` is in. Not every model hands arguments on to its attention."""


def current_pass() -> Pass:
    found = PASS.get()
    assert found, "a SlotCache is read and written by SlotCache.forward"
    return found


def join(spans: list[Span], device: torch.device, *, is_gathered: bool) -> Together:
    """Slots with one token each as one call. `is_gathered`: their keys and values are gathered from blocks."""
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
