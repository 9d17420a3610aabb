"""Trained keys and values before every sequence: prefix tuning (arXiv 2101.00190), which the published code has beside
LoRA. The language model itself stays as it is.

As in PEFT, the prefix is a past that was never read: tokens have the positions after it, and its keys are those of a
cache, already turned by their positions.

Shape letters: L layers, B sequences, G key heads, P tokens of the prefix, D head width, H hidden width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, DynamicLayer

from minigpt5.errors import ModelFolderError
from minigpt5.model.weights import load_module, load_tensors

PROJECTION = 1_024
"""Hidden width of the network that a prefix is trained through, as published."""


class Prefix(nn.Module):
    """Keys and values of P tokens in every layer: (L, 2, G, P, D)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.zeros(shape))

    @property
    def num_tokens(self) -> int:
        return self.states.shape[3]

    def forward(self) -> Tensor:
        return self.states.clone()  # ZeRO 3 takes the parameter back after the call

    def settle(self) -> Prefix:
        """As it is saved: itself."""
        return self


class ProjectedPrefix(nn.Module):
    """A prefix that is trained as the answer of a network, which the paper found to be more stable (4.3)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.num_tokens = shape, shape[3]
        layers, _, num_heads, _, width = shape
        self.tokens = nn.Embedding(self.num_tokens, PROJECTION)
        self.first = nn.Linear(PROJECTION, PROJECTION)
        self.last = nn.Linear(PROJECTION, layers * 2 * num_heads * width)

    def forward(self) -> Tensor:
        places_P = torch.arange(self.num_tokens, device=self.tokens.weight.device)
        return self._split(self.last(self.first(self.tokens(places_P)).tanh()))

    def _split(self, states_PX: Tensor) -> Tensor:
        layers, _, num_heads, num_tokens, width = self.shape
        return states_PX.view(num_tokens, layers, 2, num_heads, width).permute(1, 2, 3, 0, 4)

    @torch.no_grad()
    def settle(self) -> Prefix:
        """What the network answers. One worker of several may ask, so no module is called: under ZeRO 3 it would wait
        for the others."""
        hidden_PH = F.linear(self.tokens.weight, self.first.weight, self.first.bias).tanh()
        prefix = Prefix(self.shape)
        prefix.states.copy_(self._split(F.linear(hidden_PH, self.last.weight, self.last.bias)))
        return prefix


AnyPrefix = Prefix | ProjectedPrefix


def prefix_shape(body: Any, num_tokens: int) -> tuple[int, ...]:
    """The shape of a transformer's prefix, which reads a token to show it. Raises ModelFolderError where its layers
    keep keys and values of several shapes."""
    embedding = body.get_input_embeddings()
    ids_11 = torch.zeros(1, 1, dtype=torch.long, device=next(embedding.parameters()).device)
    cache = DynamicCache()
    with torch.no_grad():
        body(inputs_embeds=embedding(ids_11), past_key_values=cache, use_cache=True)
    shapes = {states.shape for layer in cache.layers for states in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise ModelFolderError(
            "this language model takes no prefix: its layers keep keys and values of several shapes: "
            f"{sorted(map(tuple, shapes))}; train an adapter"
        )
    _, num_heads, _, width = shapes.pop()
    return len(cache.layers), 2, num_heads, num_tokens, width


def new_prefix(body: Any, num_tokens: int, *, context_tokens: int) -> ProjectedPrefix:
    """A fresh one, to be trained. Raises ModelFolderError as `check_positions` and `prefix_shape` do."""
    check_positions(body, num_tokens, context_tokens=context_tokens)
    return ProjectedPrefix(prefix_shape(body, num_tokens))


def load_prefix(path: Path, body: Any, *, context_tokens: int) -> Prefix:
    """A trained one, frozen. Raises ModelFolderError as `new_prefix` does, or where it is another body's."""
    states = load_tensors(path).get("states")
    num_tokens = states.shape[3] if states is not None and states.dim() == 5 else 0
    prefix = Prefix(prefix_shape(body, num_tokens))
    load_module(prefix, path)
    check_positions(body, num_tokens, context_tokens=context_tokens)
    return prefix.requires_grad_(False)


def check_positions(body: Any, num_tokens: int, *, context_tokens: int) -> None:
    """Raises ModelFolderError where the positions that a transformer has learnt do not reach over both."""
    known = getattr(body.config, "max_position_embeddings", 0)
    is_turned = any("rotary" in name for name, _ in body.named_modules())  # by any position
    if not is_turned and known and context_tokens + num_tokens > known:
        raise ModelFolderError(
            f"a prefix of {num_tokens} tokens and a context of {context_tokens} are more than the {known} places "
            "that the language model knows: set a smaller context_tokens in config.json, or train an adapter"
        )


class _PrefixLayer(DynamicLayer):
    """A layer of a cache that begins with a prefix, in the type of the first keys that come after it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.keys.to(key_states), self.values.to(value_states)
        return super().update(key_states, value_states, *args, **options)


def begin(cache: DynamicCache, states_L2GPD: Tensor, *, num_sequences: int) -> None:
    """Make an empty cache begin with a prefix."""
    states_L2BGPD = states_L2GPD[:, :, None].expand(-1, -1, num_sequences, -1, -1, -1)
    cache.layers = [_PrefixLayer(keys, values) for keys, values in states_L2BGPD]
